"""The model card of an artefact folder, from the JSON of a run and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vdcompress import report, serving
from vdcompress.modeling.layout import LayerLayout


def model_card(results: Mapping[str, Any]) -> str:
    """Return the README.md of an artefact folder.

    Args:
        results: the JSON of ``apply``, ``finetune`` or ``export``.
    """
    model, plan, cache = results["model"], results["plan"], results["kv_cache"]
    name = str(model["id"]).rstrip("/").split("/")[-1]
    parts = [
        _front_matter(str(model["id"]), str(model["family"])),
        f"# {name} with a {100 * cache['reduction']:.4g}% smaller key/value cache",
        f"This is `{name}`, compressed in its architecture by vdcompress. Attention runs on the "
        "narrow latents as they are cached; nothing is restored to full width.",
        report.summary(results).markdown(),
    ]
    if gate := results.get("gate"):
        parts.append(_gate_line(gate))
    if (table := report.positions(results)) is not None:
        parts += ["## Perplexity by position", table.markdown()]
    if (results.get("healing") or {}).get("epochs"):
        parts += ["## Healing", f"![Perplexity by epoch]({report.CURVES})"]
    parts += [
        "## What the cache keeps",
        report.layers(plan).markdown(),
        *([kept.markdown()] if (kept := report.frequencies(plan)) else []),
        "## Use",
        _USE,
        "## Serve",
        *_serve(plan),
        "## How it was made",
        "`recipe.yaml` repeats it; `results.json` holds every figure; `vdcompress.json` the plan.",
    ]
    return "\n\n".join(parts) + "\n"


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))
```"""


def _serve(plan: Mapping[str, Any]) -> list[str]:
    """Return how to serve the folder with vLLM, and which engine takes it or why not."""
    verdicts = serving.verdicts([LayerLayout.from_json(layer) for layer in plan["layers"]])
    commands = serving.vllm_commands(verdicts, ".")
    shell = ["```sh\n" + "\n".join(commands) + "\n```"] if commands else []
    words = (
        "Read in the engines' sources, but for vLLM's CPU backend, which was run. A low-bit cache "
        "is the engine's own, on top of the narrow latents: `--kv-cache-dtype`."
    )
    return [*shell, words, report.engines(serving.to_json(verdicts)).markdown()]


def _front_matter(base_id: str, family: str) -> str:
    hub = base_id.count("/") == 1 and base_id[0] not in "./~"
    base = [f"base_model: {base_id}"] if hub else []
    lines = ["library_name: transformers", *base, "tags:", "  - kv-cache", f"  - {family}"]
    return "\n".join(["---", *lines, "---"])


def _gate_line(gate: Mapping[str, Any]) -> str:
    verdict = "passed" if gate["passed"] else "**missed**"
    return (
        f"Quality gate {verdict}: perplexity {gate['ratio']:.4f} times the base's, "
        f"{gate['max_ratio']:g} allowed."
    )
