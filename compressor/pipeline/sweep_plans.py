"""The plans of a sweep: every combination of the lists that were asked for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vdcompress.errors import OptionError, UsageError
from vdcompress.recipe import Recipe, parse

AXES = {
    "v_dim": "plan.v_dim",
    "k_dim": "plan.k_dim",
    "k_rotary_dim": "plan.k_rotary_dim",
    "kv_budget": "plan.kv_budget",
    "groups": "plan.groups",
    "v_groups": "plan.v_groups",
    "k_groups": "plan.k_groups",
    "allocation": "plan.allocation",
    "bits": "plan.bits",
    "v_bits": "plan.v_bits",
    "k_bits": "plan.k_bits",
    "k_rotary_bits": "plan.k_rotary_bits",
    "target": "plan.target",
    "initializer": "start.initializer",
    "refit": "start.refit",
}
WIDTHS = ("v_dim", "k_dim", "k_rotary_dim")
BUDGET = "kv_budget"
SHORT = {
    "v_dim": "v",
    "k_dim": "k",
    "k_rotary_dim": "r",
    "kv_budget": "kv",
    "groups": "g",
    "v_groups": "vg",
    "k_groups": "kg",
    "bits": "b",
    "v_bits": "vb",
    "k_bits": "kb",
    "k_rotary_bits": "rb",
}

Axes = Mapping[str, Sequence[Any]]


def variants(recipe: Recipe, axes: Axes) -> tuple[Recipe, ...]:
    """Return a recipe for each combination; those that say the same once.

    Widths and budgets exclude each other: the combinations of widths come first, then the budgets,
    each with every combination of the rest.

    Args:
        recipe: what the combinations have in common.
        axes: values by the names in :data:`AXES`.

    Raises:
        UsageError: a list is empty, or its name is unknown.
        OptionError: for a value that no recipe takes.
    """
    for name, values in axes.items():
        if name not in AXES:
            raise UsageError(f"nothing to vary is called {name!r}", f"one of {', '.join(AXES)}")
        if not values:
            raise UsageError(f"{name} has no values", "give at least one")
    rest = {name: values for name, values in axes.items() if name not in (*WIDTHS, BUDGET)}
    found = {
        label(varied): varied
        for way in _ways(axes)
        for others in _product(rest)
        for varied in [_with(recipe, way | others)]
    }
    return tuple(found.values())


def label(recipe: Recipe) -> str:
    """Return what tables and files call a plan, such as ``v320-k320-g1-optimal``."""
    section = recipe.plan.model_dump(exclude_defaults=True)
    words = [f"{SHORT[name]}{_short(section[name])}" for name in SHORT if name in section]
    words += [str(value) for name, value in section.items() if name not in SHORT]
    start = recipe.start
    words += [start.initializer] if start.initializer is not None else []
    words += [start.refit] if start.refit is not None else []
    words += [f"alternate{start.alternate}"] if start.alternate is not None else []
    return "-".join(words)


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _ways(axes: Axes) -> Iterator[dict[str, Any]]:
    widths = {name: axes[name] for name in WIDTHS if name in axes}
    if widths or BUDGET not in axes:
        yield from _product(widths)
    yield from ({BUDGET: share} for share in axes.get(BUDGET, ()))


def _product(axes: Axes) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _with(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """Return the recipe with one combination; a budget replaces its widths, widths its budget."""
    data = recipe.model_dump()
    replaced = WIDTHS if BUDGET in values else (BUDGET,) if set(values) & set(WIDTHS) else ()
    data["plan"] = {name: value for name, value in data["plan"].items() if name not in replaced}
    for name, value in values.items():
        section, key = AXES[name].split(".")
        data[section][key] = value
    return parse(data, "these options", OptionError)
