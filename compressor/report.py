"""Results as tables, from the JSON of a run and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from vdcompress.modeling.layout import TYPICAL_TOKENS, LayerLayout
from vdcompress.plan import Plan

T = TypeVar("T")
Results = Mapping[str, Any]
Form = Callable[[float | None], str]
NONE = "-"
CURVES = "curves.png"


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
    planned: list[float | None] = [whole, *[narrow] * (1 + healed)]
    found: list[tuple[str, Form, list[float | None]]] = [
        ("parameters", count, [parameters["base"], *[parameters["compressed"]] * (1 + healed)]),
        (_of_tokens("cache, bytes per token", results, TYPICAL_TOKENS), count, planned),
    ]
    if (measured := cache.get("measured")) is not None:
        sizes = [measured["bytes_per_token"]] * (1 + healed)
        title = _of_tokens("  measured after generate()", results, measured["tokens"])
        found.append((title, count, [whole, *sizes]))
    if perplexity:
        names = ("base", "compressed", "healed") if healed else ("base", "compressed")
        found.append(("perplexity", ppl, [perplexity.get(name) for name in names]))
    rows = [
        (title, *map(form, values), change(values[0], values[-1])) for title, form, values in found
    ]
    if perplexity.get("kl") is not None:
        keys = ["compressed_kl", "kl"] if healed else ["kl"]
        distances = (nats(perplexity.get(key)) for key in keys)
        rows.append(("KL to the base, nats per token", NONE, *distances, ""))
    header = ("", "base", "compressed", *(["healed"] if healed else []), "change")
    return Table("", header, tuple(rows))


def _of_tokens(title: str, results: Results, tokens: int) -> str:
    """Say of how many tokens bytes are a share, where that matters."""
    plan = results.get("plan")
    matters = plan is not None and Plan.from_json(plan).depends_on_length
    return f"{title}, of {count(tokens)} tokens" if matters else title


def positions(results: Results) -> Table | None:
    """Return perplexity by position in the window, None if it was not measured."""
    buckets = results.get("positions") or []
    healed = any(bucket.get("healed") is not None for bucket in buckets)
    names = ("base", "compressed", "healed") if healed else ("base", "compressed")
    rows = [
        (f"{bucket['from']}-{bucket['to']}", *(ppl(bucket.get(name)) for name in names))
        for bucket in buckets
    ]
    return Table("perplexity by position", ("tokens", *names), tuple(rows)) if rows else None


def tasks(results: Results) -> Table | None:
    """Return what lm-evaluation-harness found, None if it was not asked."""
    rows = [
        (name, metric, f"{values['base']:.4g}", f"{values['compressed']:.4g}")
        for name, metrics in (results.get("tasks") or {}).items()
        for metric, values in metrics.items()
    ]
    header = ("task", "metric", "base", "compressed")
    return Table("lm-evaluation-harness", header, tuple(rows), words=2) if rows else None


def layers(plan: Results) -> Table:
    """Return what each layer keeps in its cache; equal layers share a row."""
    header = ("layers", "K latents", "rotary", "V latents", "K numbers", "V numbers", "bits K / V")
    rows = _runs([_layer_cells(layer) for layer in plan["layers"]])
    return Table("what each layer's cache keeps for a token", header, rows)


def frequencies(plan: Results) -> Table | None:
    """Return how often K latents keep each rotary frequency; None where all keep all."""
    pairs = plan["shape"]["rotary_dim"] // 2
    kept = [_counts(layer, pairs) for layer in plan["layers"]]
    if all(counts is None for counts in kept):
        return None
    header = ("layers", "of", "frequency x virtual heads, fastest first")
    heads = plan["shape"]["kv_heads"]
    cells = []
    for layer, counts in zip(plan["layers"], kept, strict=True):
        most = heads // _k_groups(layer)
        spans = _spans(counts if counts is not None else [most] * pairs)
        cells.append((str(most), ", ".join(f"{_span(a, b)} x {n}" for a, b, n in spans if n)))
    return Table("rotary frequencies that each K latent keeps", header, _runs(cells), words=3)


def spent(plan: Results, predicted: Results | None = None) -> Table:
    """Return where the bytes of a token go, and what each part is predicted to lose.

    Args:
        plan: the plan's JSON.
        predicted: ``predicted_loss`` of a document; None leaves those columns out.
    """
    losses = predicted["layers"] if predicted else [None] * len(plan["layers"])
    rows = [_spent_cells(layer, loss) for layer, loss in zip(plan["layers"], losses, strict=True)]
    total = [sum(part) for part in zip(*(_bytes(layer) for layer in plan["layers"]), strict=True)]
    last: tuple[str, ...] = ("all", *map(count, total), count(sum(total)))
    header: tuple[str, ...] = ("layers", "V", "K", "K rotary", "bytes")
    title = "bytes per token"
    if plan["sinks"] or plan["window"]:
        title += " that is packed"
    if predicted:
        title += ", and predicted loss"
        header += ("loss of V", "of K", "of K rotary", "nats")
        parts = (predicted["v"], predicted["k_nope"], predicted["k_rotary"], predicted["total"])
        last += tuple(map(nats, parts))
    return Table(title, header, (*_runs(rows), last))


def costs(cost: Results) -> Table:
    """Return weights and arithmetic of attention, before and after."""
    names = {
        "weights": "weights of the projections",
        "flops_per_token": "operations per new token",
        "flops_per_cached_token": "  and per token in the cache",
    }
    base, narrow = cost["base"], cost["compressed"]
    rows = tuple(
        (title, count(base[name]), count(narrow[name]), change(base[name], narrow[name]))
        for name, title in names.items()
    )
    return Table("attention, all layers", ("", "base", "compressed", "change"), rows)


def engines(verdicts: Sequence[Results]) -> Table:
    """Return which engine takes a model, with which of its own low-bit caches, or why not.

    Args:
        verdicts: ``serving`` of a document.
    """
    rows = tuple(
        (
            verdict["engine"],
            verdict["backend"],
            "yes" if verdict["serves"] else "no",
            ", ".join(verdict["cache_dtypes"]) or NONE,
            verdict["note"],
        )
        for verdict in verdicts
    )
    header = ("engine", "attention", "serves", "low-bit caches", "")
    return Table("who serves it", header, rows, words=5)


def is_per_head(plan: Results) -> bool:
    """Say whether a plan narrows V alone, with a latent for each of several heads."""
    heads, full = plan["shape"]["kv_heads"], plan["shape"]["head_dim"]
    return (
        heads > 1
        and plan["k_dim"] == heads * full
        and plan["k_groups"] == plan["v_groups"] == heads
        and plan["v_dim"] not in (None, heads * full)
    )


def change(before: float | None, after: float | None) -> str:
    """Return a signed percentage, or a dash."""
    return NONE if not before or after is None else _percent(after / before - 1)


def duration(seconds: float | None) -> str:
    """Return a time in the two units that matter, or a dash."""
    if seconds is None:
        return NONE
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _runs(cells: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Put the numbers of layers before their cells; equal neighbours share a row."""
    return tuple((_span(first, last), *row) for first, last, row in _spans(cells))


def _spans(values: Sequence[T]) -> list[tuple[int, int, T]]:
    """Return first place, last place and value of each run of equal values."""
    found: list[tuple[int, int, T]] = []
    for place, value in enumerate(values):
        if found and found[-1][2] == value:
            found[-1] = (found[-1][0], place, value)
        else:
            found.append((place, place, value))
    return found


def _span(first: int, last: int) -> str:
    return f"{first}-{last}" if last > first else str(first)


def _layer_cells(layer: Results) -> tuple[str, ...]:
    v, nope, rotary = layer["v"], layer["k_nope"], layer["k_rotary"]
    k_width = nope["width"] + rotary["width"]
    k_bits: Sequence[int] = sorted({part["bits"] for part in (nope, rotary) if part["width"]})
    return (
        f"{_k_groups(layer)} x {k_width}",
        "mapped behind" if nope["after_rope"] else str(rotary["width"]),
        f"{v['groups']} x {v['width']}",
        str(nope["groups"] * nope["width"] + rotary["groups"] * rotary["width"]),
        str(v["groups"] * v["width"]),
        f"{'+'.join(map(str, k_bits))} / {v['bits']}",
    )


def _k_groups(layer: Results) -> int:
    nope, rotary = layer["k_nope"], layer["k_rotary"]
    return int(nope["groups"] if nope["width"] else rotary["groups"])


def _counts(layer: Results, frequencies: int) -> list[int] | None:
    """Return how many virtual heads keep each frequency, None where nothing was chosen."""
    kept = layer["k_rotary"]["frequencies"]
    if layer["k_nope"]["after_rope"] or kept == list(range(frequencies)):
        return None
    return [kept.count(index) for index in range(frequencies)]


def _bytes(layer: Results) -> tuple[float, ...]:
    """Return the bytes per token of V, K and rotary K, sinks and window left out."""
    parts = LayerLayout.from_json(layer).parts
    return tuple(part.cache_bytes(TYPICAL_TOKENS) / TYPICAL_TOKENS for part in parts)


def _spent_cells(layer: Results, loss: Results | None) -> tuple[str, ...]:
    found = _bytes(layer)
    cells = (*map(count, found), count(sum(found)))
    if loss is None:
        return cells
    parts = (loss["v"], loss["k_nope"], loss["k_rotary"])
    return (*cells, *map(nats, parts), nats(sum(parts)))


def count(value: float | None) -> str:
    """Return a number with its thousands apart, or a dash."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def ppl(value: float | None) -> str:
    """Return a perplexity, or a dash."""
    return NONE if value is None else f"{value:.2f}"


def nats(value: float | None) -> str:
    """Return a divergence, or a dash."""
    return NONE if value is None else f"{value:.4f}"


def _percent(share: float) -> str:
    digits = 1 if abs(share) >= 0.1 else 2
    return f"{100 * share:+.{digits}f}%"
