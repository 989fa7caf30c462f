"""``apply`` for a model larger than memory: layer by layer, from shards into shards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdcompress import runs
from vdcompress.artifact import (
    MAX_SHARD_SIZE,
    Compressed,
    new_folder,
    require_free,
    write_companions,
    write_config,
)
from vdcompress.calibrate import GRADIENTS, PULLS
from vdcompress.card import model_card
from vdcompress.errors import UsageError
from vdcompress.evaluate_layerwise import evaluate_stacks
from vdcompress.events import OnEvent, Stopwatch, Warned, ignore
from vdcompress.load import BaseConfig, fetch, load_config, read_tokenizer
from vdcompress.pipeline import text
from vdcompress.pipeline.document import Timed, document, environment, judged, peak_memory
from vdcompress.pipeline.settings import checked_request, plan_of, request_of, settle, start_of
from vdcompress.plan import Plan
from vdcompress.recipe import Recipe, model_of
from vdcompress.rewrite import needed_statistics
from vdcompress.rewrite_layerwise import base_stack, compressed_stack, write_compressed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vdcompress.evaluate import Evaluation

FLOAT32_BYTES = 4
STATES_SHARE = 4
LAYER_COPIES = 2


def exceeds(recipe: Recipe, max_memory: int) -> bool:
    """Say whether the float32 weights of a recipe's base take more than ``max_memory`` bytes."""
    base = load_config(model_of(recipe), revision=recipe.revision)
    return FLOAT32_BYTES * _numbers(base.family.base_on_meta(base.config)) > max_memory


def apply_streaming(
    recipe: Recipe,
    *,
    max_memory: int,
    output: Path | None = None,
    force: bool = False,
    device: str = "cpu",
    root: Path = runs.ROOT,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Do what :func:`~vdcompress.pipeline.apply.apply_recipe` does, one layer in memory at a time.

    The folder is the same, and so are the weights of a start without gradients, which go through
    the whole model: latents are ``optimal`` where the recipe leaves that open, and keys are not
    alternated with queries. The figures are those of the written shards, read back. The cache is
    counted from the plan, not measured after ``generate()``.

    Args:
        recipe: what to do.
        max_memory: bytes; hidden states that would take a quarter of it go to a temporary file
            beside the output.
        output: the folder to write; None takes a new one under ``root``.
        force: replace what is in ``output``.
        device: where to calculate.
        root: the folder of all runs.
        on_event: hears what happens.

    Raises:
        UsageError: for a plan or a start that needs gradients of the whole model.
        VDCompressError: nothing is written then.
    """
    if output is not None:
        require_free(output, force=force)
    timed = Timed(on_event)
    start_memory = peak_memory()
    job = _open(recipe, max_memory, device, timed)
    folder = output or runs.new_run(model_of(recipe), request_of(recipe).label(), root)
    with new_folder(folder, force=force) as partial:
        states_in = partial if job.spills(max_memory) else None
        with Stopwatch(timed).stage("compress", job.plan.shape.layers):
            write_compressed(
                job.base,
                job.plan,
                job.windows.tokens,
                partial,
                max_shard_size=MAX_SHARD_SIZE,
                states_in=states_in,
                device=device,
                on_event=timed,
            )
        with Stopwatch(timed).stage("evaluate", 2 * job.plan.shape.layers):
            quality = _evaluate(job, partial, states_in, timed)
        results = document(
            "apply",
            job.base,
            job.plan,
            run=str(folder),
            **_measured(quality, job.recipe),
            gate=judged(job.recipe, quality.ratio),
            seconds=timed.seconds,
            environment=environment(device, start_memory),
        )
        with Stopwatch(timed).stage("write"):
            _finish(job, partial, results)
    return results


@dataclass(frozen=True)
class _Job:
    """What is to be done: all but the weights."""

    base: BaseConfig
    tokenizer: Any
    recipe: Recipe
    plan: Plan
    windows: text.Windows
    tokens: Tensor
    device: str

    def spills(self, max_memory: int) -> bool:
        """Say whether the hidden states are too large to be kept in memory."""
        tokens = max(self.windows.tokens.numel(), 2 * len(self.tokens))
        return STATES_SHARE * tokens * self.base.shape.hidden * FLOAT32_BYTES > max_memory


def _open(recipe: Recipe, max_memory: int, device: str, on_event: OnEvent) -> _Job:
    """Settle recipe and plan, find the files and read the texts."""
    config = load_config(model_of(recipe), revision=recipe.revision)
    named = recipe.merged({"start.initializer": recipe.start.initializer or "optimal"})
    settled = settle(named, config.config, on_event)
    _require_streamable(settled, config)
    plan = plan_of(settled, config.shape, on_event)
    if PULLS in needed_statistics(plan.start, plan.shape, plan):
        on_event(Warned("--max-memory leaves out the alternation of keys with queries"))
    needed = LAYER_COPIES * FLOAT32_BYTES * _layer_numbers(config)
    if needed > max_memory:
        on_event(
            Warned(
                f"one layer in work takes about {needed / 1e9:.1f} GB, "
                f"more than the {max_memory / 1e9:.1f} GB of --max-memory"
            )
        )
    with Stopwatch(on_event).stage("load"):
        base = fetch(model_of(recipe), revision=recipe.revision)
        base = replace(base, dtype=recipe.dtype or base.dtype)
        tokenizer = read_tokenizer(base.folder)
        base_stack(base)  # every tensor is there, or this is the time to say so
    with Stopwatch(on_event).stage("read text"):
        windows = text.calibration_windows(settled, tokenizer)
        tokens = text.evaluation_tokens(settled, tokenizer)
    return _Job(base, tokenizer, settled, plan, windows, tokens, device)


def _require_streamable(recipe: Recipe, config: BaseConfig) -> None:
    """Raise :class:`UsageError` for what takes the whole model at once."""
    if checked_request(recipe, config.shape).needs_gains(config.shape):
        raise UsageError(
            "this plan needs the gains of the whole model, which --max-memory keeps out of memory",
            "name widths that need none (--v-dim, --k-dim, --k-rotary-dim), or allow more memory",
        )
    start = start_of(recipe)
    if needed_statistics(start, config.shape) & GRADIENTS:
        raise UsageError(
            f"{start.initializer} needs gradients through the whole model, which --max-memory "
            "keeps out of memory",
            "take --initializer optimal, or allow more memory",
        )


def _evaluate(job: _Job, folder: Path, states_in: Path | None, on_event: OnEvent) -> Evaluation:
    """Run base and written shards beside each other."""
    section = job.recipe.evaluation
    return evaluate_stacks(
        compressed_stack(job.base, job.plan, folder, job.device),
        base_stack(job.base, job.device),
        job.tokens,
        window=section.seq_len,
        windows=section.windows,
        positions=section.positions,
        folder=states_in,
        on_event=on_event,
    )


def _measured(quality: Evaluation, recipe: Recipe) -> dict[str, Any]:
    """Return the document's fields ``perplexity`` and ``positions``."""
    found = quality.to_json(data=text.evaluation_data(recipe))
    return {name: found[name] for name in ("perplexity", "positions")}


def _finish(job: _Job, folder: Path, results: dict[str, Any]) -> None:
    """Write what an artefact holds beside its weights."""
    base = job.base
    compressed = Compressed(
        model=base.family.compressed_on_meta(base.config, job.plan),
        tokenizer=job.tokenizer,
        plan=job.plan,
        base_id=base.id,
        base_revision=base.revision,
        source_folder=base.folder,
        dtype=base.dtype,
        calibration=job.windows.digest,
    )
    write_config(folder, compressed)
    write_companions(
        folder,
        compressed,
        results=results,
        recipe=job.recipe.dumps(),
        card=model_card(results),
    )


def _layer_numbers(base: BaseConfig) -> int:
    """Count the weights of one layer."""
    model = base.family.base_on_meta(base.config)
    return _numbers(next(model.get_submodule(base.family.layers_prefix()).children()))


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
