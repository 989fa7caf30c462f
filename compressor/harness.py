"""Tasks of lm-evaluation-harness (``lm_eval``), where it is installed, on both models.

https://github.com/EleutherAI/lm-evaluation-harness keeps the tasks, their metrics and their data; a
task of your own is a YAML file. Nothing here is imported until it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vdcompress.errors import UsageError

NAME, HINT = "lm_eval", "pip install 'lm_eval[hf]'"


def require_installed() -> None:
    """Raise :class:`UsageError` with a hint unless ``lm_eval`` is installed."""
    if find_spec(NAME) is None:
        raise UsageError("lm-evaluation-harness is not installed", HINT)


def task_names(text: str) -> list[str]:
    """Read ``hellaswag,piqa`` or paths of YAML files; files are named absolutely.

    Raises:
        UsageError: nothing is named, or a file is missing.
    """
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise UsageError("--lm-eval names no task", "like: --lm-eval hellaswag,piqa")
    files = [name for name in found if name.endswith((".yaml", ".yml"))]
    if missing := [name for name in files if not Path(name).is_file()]:
        raise UsageError(
            f"there is no task file {missing[0]}", "name a task, or a YAML file of one"
        )
    return [str(Path(name).absolute()) if name in files else name for name in found]


def run_tasks(
    models: Sequence[Any],
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch: int = 8,
) -> list[dict[str, dict[str, float]]]:
    """Return every metric of every task, ``{task: {metric: value}}``, of each model.

    Args:
        models: causal language models of transformers.
        tokenizer: theirs.
        tasks: names, or absolute paths of YAML files.
        limit: examples of each task, None for all.
        batch: sequences at a time.

    Raises:
        UsageError: a task is unknown, or its data cannot be had.
    """
    require_installed()
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    index = TaskManager()  # of all tasks there are; it takes seconds
    answers = []
    for model in models:
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        try:
            answer = lm_eval.simple_evaluate(
                wrapped,
                tasks=list(tasks),
                task_manager=index,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        except (KeyError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"lm_eval could not run the tasks: {reason}", "lm_eval ls tasks"
            ) from error
        found = (answer or {})["results"]
        answers.append({task: _figures(figures) for task, figures in found.items()})
    return answers


def compared(
    base: Mapping[str, Mapping[str, float]], compressed: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return ``{task: {metric: {"base": x, "compressed": y}}}``."""
    return {
        task: {
            metric: {"base": base[task][metric], "compressed": value}
            for metric, value in metrics.items()
        }
        for task, metrics in compressed.items()
    }


def _figures(found: Mapping[str, Any]) -> dict[str, float]:
    """Keep a task's metrics, named without the filter where it is lm_eval's ``none``."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in found.items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float)
    }
