"""Results as tables and as a model card, from the JSON of a run and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]
Form = Callable[[float | None], str]
NONE = "-"


@dataclass(frozen=True)
class Table:
    """A table of text: the command line draws it, :meth:`markdown` writes it.

    Attributes:
        title: above it, may be empty.
        header: names of the columns.
        rows: cells as text, one for each column.
        words: how many columns, from the left, hold words rather than figures.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1

    @property
    def right(self) -> range:
        """The columns that stand to the right."""
        return range(self.words, len(self.header))

    def markdown(self) -> str:
        """Return the table as GitHub's markdown."""
        rule = ["--:" if column in self.right else ":--" for column in range(len(self.header))]
        lines = [self.header, rule, *self.rows]
        return "\n".join(f"| {' | '.join(cell or ' ' for cell in line)} |" for line in lines)


def summary(results: Results) -> Table:
    """Return what a run did: size, cache and perplexity, before and after."""
    parameters, cache = results["parameters"], results["kv_cache"]
    perplexity = results.get("perplexity") or {}
    healed = perplexity.get("healed") is not None
    whole, narrow = cache["base_bytes_per_token"], cache["bytes_per_token"]
    found: list[tuple[str, Form, list[float | None]]] = [
        ("parameters", _count, [parameters["base"], *[parameters["compressed"]] * (1 + healed)]),
        ("cache, bytes per token", _count, [whole, *[narrow] * (1 + healed)]),
    ]
    if (measured := cache.get("measured")) is not None:
        sizes = [measured["bytes_per_token"]] * (1 + healed)
        found.append(("  measured after generate()", _count, [whole, *sizes]))
    if perplexity:
        names = ("base", "compressed", "healed") if healed else ("base", "compressed")
        found.append(("perplexity", _ppl, [perplexity.get(name) for name in names]))
    rows = [
        (title, *map(form, values), change(values[0], values[-1])) for title, form, values in found
    ]
    if perplexity.get("kl") is not None:
        keys = ["compressed_kl", "kl"] if healed else ["kl"]
        distances = (_nats(perplexity.get(key)) for key in keys)
        rows.append(("KL to the base, nats per token", NONE, *distances, ""))
    header = ("", "base", "compressed", *(["healed"] if healed else []), "change")
    return Table("", header, tuple(rows))


def positions(results: Results) -> Table | None:
    """Return perplexity by position in the window, None if it was not measured."""
    buckets = results.get("positions") or []
    healed = any(bucket.get("healed") is not None for bucket in buckets)
    names = ("base", "compressed", "healed") if healed else ("base", "compressed")
    rows = [
        (f"{bucket['from']}-{bucket['to']}", *(_ppl(bucket.get(name)) for name in names))
        for bucket in buckets
    ]
    return Table("perplexity by position", ("tokens", *names), tuple(rows)) if rows else None


def layers(plan: Results) -> Table:
    """Return what each layer keeps in its cache; equal layers share a row."""
    header = ("layers", "K latents", "V latents", "K numbers", "V numbers", "bits K / V")
    spans: list[tuple[int, int, tuple[str, ...]]] = []
    for index, layer in enumerate(plan["layers"]):
        cells = _layer_cells(layer)
        if spans and spans[-1][2] == cells:
            spans[-1] = (spans[-1][0], index, cells)
        else:
            spans.append((index, index, cells))
    rows = tuple(
        (f"{first}-{last}" if last > first else str(first), *cells) for first, last, cells in spans
    )
    return Table("what each layer's cache keeps for a token", header, rows)


def model_card(results: Results) -> str:
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
        "narrow values as they are cached; nothing is restored to full width.",
        summary(results).markdown(),
    ]
    if gate := results.get("gate"):
        parts.append(_gate_line(gate))
    if (table := positions(results)) is not None:
        parts += ["## Perplexity by position", table.markdown()]
    parts += [
        "## What the cache keeps",
        layers(plan).markdown(),
        "## Use",
        _USE,
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


def change(before: float | None, after: float | None) -> str:
    """Return a signed percentage, or a dash."""
    return NONE if not before or after is None else _percent(after / before - 1)


def _front_matter(base_id: str, family: str) -> str:
    hub = base_id.count("/") == 1 and base_id[0] not in "./~"
    base = [f"base_model: {base_id}"] if hub else []
    lines = ["library_name: transformers", *base, "tags:", "  - kv-cache", f"  - {family}"]
    return "\n".join(["---", *lines, "---"])


def _gate_line(gate: Results) -> str:
    verdict = "passed" if gate["passed"] else "**missed**"
    return (
        f"Quality gate {verdict}: perplexity {gate['ratio']:.4f} times the base's, "
        f"{gate['max_ratio']:g} allowed."
    )


def _layer_cells(layer: Results) -> tuple[str, ...]:
    v, nope, rotary = layer["v"], layer["k_nope"], layer["k_rotary"]
    k_width = nope["width"] + rotary["width"]
    k_groups = nope["groups"] if nope["width"] else rotary["groups"]
    k_bits: Sequence[int] = sorted({nope["bits"], rotary["bits"]})
    return (
        f"{k_groups} x {k_width}",
        f"{v['groups']} x {v['width']}",
        str(nope["groups"] * nope["width"] + rotary["groups"] * rotary["width"]),
        str(v["groups"] * v["width"]),
        f"{'+'.join(map(str, k_bits))} / {v['bits']}",
    )


def _count(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _ppl(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _nats(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _percent(share: float) -> str:
    digits = 1 if abs(share) >= 0.1 else 2
    return f"{100 * share:+.{digits}f}%"
