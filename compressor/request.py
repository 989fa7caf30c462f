"""What a user asks of a plan: widths, groups or a budget, checked against a model's shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vdcompress.errors import PlanError
from vdcompress.modeling.layout import BITS, TYPICAL_TOKENS

if TYPE_CHECKING:
    from vdcompress.plan import ModelShape

UNIFORM, LAYERS = "uniform", "layers"
TRANSFORMERS, VLLM = "transformers", "vllm"
ALLOCATIONS, TARGETS = (UNIFORM, LAYERS), (TRANSFORMERS, VLLM)
STEP = 8
AUTO, NUMBER_BITS, ROTARY_BITS = "auto", 16, 8


@dataclass(frozen=True)
class Request:
    """What the cache shall keep; everything is optional but one of three.

    Attributes:
        v_dim: width of V per token and layer over all groups; None keeps V whole.
        k_dim: the same of K, rotary and other dimensions together; None keeps K whole.
        v_groups: latents of V per layer; None is one for each key/value head, or, with a
            ``kv_budget``, what loses least.
        k_groups: the same of K.
        k_rotary_dim: how much of ``k_dim`` is rotary; None keeps all of it with one latent per
            head, where it fits, else gains choose.
        kv_budget: fraction of the base's bytes per token, in place of ``v_dim`` and ``k_dim``.
        allocation: ``uniform``, or ``layers`` for widths that differ by layer at the same bytes;
            None is ``layers`` for a budget whose target takes that, else ``uniform``.
        bits: of both sides where they do not say their own; ``auto`` lets a ``kv_budget`` choose
            those of every layer and part.
        v_bits: of V's latents, 16, 8, 4, 3 or 2; None is ``bits``, else 16.
        k_bits: of K's likewise.
        k_rotary_bits: of the rotary part of K; None is ``k_bits``, but at least 8.
        sinks: first tokens of a sequence that stay in 16 bits; None is 4 where anything has fewer
            than 8 bits.
        window: newest tokens that stay in 16 bits; None is 64 there, 16 with ``bits`` ``auto``.
        target: ``transformers``, or ``vllm``: one layout for all layers, as many K latents as V
            latents, equally wide.
    """

    v_dim: int | None = None
    k_dim: int | None = None
    v_groups: int | None = None
    k_groups: int | None = None
    k_rotary_dim: int | None = None
    kv_budget: float | None = None
    allocation: str | None = None
    bits: int | str | None = None
    v_bits: int | None = None
    k_bits: int | None = None
    k_rotary_bits: int | None = None
    sinks: int | None = None
    window: int | None = None
    target: str = TRANSFORMERS

    @classmethod
    def of(cls, *, groups: int | None = None, **values: object) -> Request:
        """Return a request whose ``groups`` hold for every side that it changes."""
        asked: Request = cls(**values)  # type: ignore[arg-type]
        if groups is None:
            return asked
        free = asked.kv_budget is not None
        v_groups = groups if asked.v_dim is not None or free else None
        k_groups = groups if asked.k_dim is not None or free else None
        chosen = {"v_groups": asked.v_groups or v_groups, "k_groups": asked.k_groups or k_groups}
        return cls(**values | chosen)  # type: ignore[arg-type]

    @property
    def empty(self) -> bool:
        """Whether nothing is asked for."""
        return not self.narrows and not self.packs

    @property
    def narrows(self) -> bool:
        """Whether a width or a budget is asked for."""
        return (self.v_dim, self.k_dim, self.kv_budget) != (None, None, None)

    @property
    def packs(self) -> bool:
        """Whether any part shall have fewer than 16 bits."""
        choices = (self.v_choices, self.k_choices, self.k_rotary_choices)
        return any(bits < NUMBER_BITS for found in choices for bits in found)

    @property
    def v_choices(self) -> tuple[int, ...]:
        """The bits that V may have."""
        return self._bits_of(self.v_bits)

    @property
    def k_choices(self) -> tuple[int, ...]:
        """The bits that K may have, its rotary part aside."""
        return self._bits_of(self.k_bits)

    @property
    def k_rotary_choices(self) -> tuple[int, ...]:
        """The bits that the rotary part of K may have; where K's are named, at least 8."""
        if self.k_rotary_bits is not None:
            return (self.k_rotary_bits,)
        if self.k_bits is None and self.bits == AUTO:
            return BITS
        return tuple(max(bits, ROTARY_BITS) for bits in self.k_choices)

    def _bits_of(self, own: int | None) -> tuple[int, ...]:
        if own is not None:
            return (own,)
        return BITS if self.bits == AUTO else (int(self.bits or NUMBER_BITS),)

    @property
    def by_layer(self) -> bool:
        """Whether widths may differ by layer."""
        if self.allocation is None:
            return self.kv_budget is not None and self.target != VLLM
        return self.allocation == LAYERS

    @property
    def default_initializer(self) -> str:
        """Return what finds latents where nobody says.

        ``optimal`` is as good as ``fisher`` for V with a latent for each head, and needs no
        gradients; for keys and shared latents the loss's own metric is far ahead.
        """
        if not self.narrows:
            return "optimal"
        plain = self.k_dim is None and self.kv_budget is None and not self.by_layer
        return "optimal" if plain and self.v_groups is None else "fisher"

    def needs_gains(self, shape: ModelShape) -> bool:
        """Say whether the plan depends on calibrated gains, not on the shape alone."""
        if self.kv_budget is not None or self.by_layer:
            return True
        return self.k_dim is not None and not self._keeps_all_rotary(shape)

    def groups(self, shape: ModelShape) -> tuple[int, int]:
        """Return how many latents V and K have where nothing is left to gains."""
        return self.v_groups or shape.kv_heads, self.k_groups or shape.kv_heads

    def label(self) -> str:
        """Return a name for runs, such as ``v320``, ``g1-v192-k192`` or ``kv0.5``."""
        v_groups, k_groups = self.v_groups, self.k_groups
        if v_groups == k_groups:
            words = [f"g{v_groups}"] if v_groups else []
        else:
            named = ((f"{side}g", n) for side, n in (("v", v_groups), ("k", k_groups)))
            words = [f"{name}{number}" for name, number in named if number]
            if len(words) == 1 and (self.v_dim is None or self.k_dim is None):
                words = [words[0][1:]]
        if self.kv_budget is not None:
            words.append(f"kv{self.kv_budget:g}")
        words += [f"v{self.v_dim}"] if self.v_dim is not None else []
        words += [f"k{self.k_dim}"] if self.k_dim is not None else []
        words += [f"r{self.k_rotary_dim}"] if self.k_rotary_dim is not None else []
        words += [f"b{self.bits}"] if self.bits is not None else []
        bits = (("vb", self.v_bits), ("kb", self.k_bits), ("rb", self.k_rotary_bits))
        words += [f"{name}{number}" for name, number in bits if number is not None]
        words += [f"s{self.sinks}"] if self.sinks is not None else []
        words += [f"w{self.window}"] if self.window is not None else []
        if self.allocation is not None and (self.kv_budget is None) == self.by_layer:
            words.append(self.allocation)
        words += [self.target] if self.target != TRANSFORMERS else []
        return "-".join(words)

    def problems(self, shape: ModelShape) -> list[str]:
        """Say everything that forbids this request for a model of this shape."""
        found = self._choices()
        found += _groups_problems("v", self.v_groups, self.v_dim, self.kv_budget, shape)
        found += _groups_problems("k", self.k_groups, self.k_dim, self.kv_budget, shape)
        if found:
            return found
        v_groups, k_groups = self.groups(shape)
        found += width_problems("v_dim", self.v_dim, v_groups, shape)
        found += width_problems("k_dim", self.k_dim, k_groups, shape)
        found += self._rotary_problems(k_groups, shape)
        if self.k_rotary_bits is not None and shape.rotary_dim == shape.head_dim:
            found.append("k_rotary_bits: RoPE rotates whole heads here, k_bits is what they have")
        found += self._budget_problems(shape)
        settled = self.kv_budget is None or (self.v_groups and self.k_groups)
        if settled and max(v_groups, k_groups) % min(v_groups, k_groups):
            found.append(f"{v_groups} groups of V and {k_groups} of K: neither is a multiple")
        if self.target == VLLM:
            found += self._vllm_problems(v_groups, k_groups, shape)
        return found

    def _budget_problems(self, shape: ModelShape) -> list[str]:
        """Say whether a budget is below the narrowest latents that there are."""
        if self.kv_budget is None:
            return []
        bits = (self.v_groups or 1) * min(self.v_choices)
        bits += (self.k_groups or 1) * min((*self.k_choices, *self.k_rotary_choices))
        least = STEP * bits / (2 * shape.kv_dim * NUMBER_BITS)
        if self.kv_budget >= least:
            return []
        return [f"kv_budget {self.kv_budget:g} is too few bytes: the least is {least:.4g}"]

    def require(self, shape: ModelShape) -> None:
        """Raise one :class:`PlanError` that names all :meth:`problems`, if there are any."""
        if found := self.problems(shape):
            raise PlanError(found, suggestion(self, shape))

    def _choices(self) -> list[str]:
        found = []
        if self.empty:
            found.append("no width and no bits: neither v_dim, k_dim, kv_budget nor bits are given")
        found += self._bits_problems()
        if self.kv_budget is not None:
            if not 0 < self.kv_budget <= 1:
                found.append(f"kv_budget {self.kv_budget:g} is not above 0 and at most 1")
            for name in ("v_dim", "k_dim", "k_rotary_dim"):
                if getattr(self, name) is not None:
                    found.append(f"kv_budget excludes {name}")
        if self.allocation not in (None, *ALLOCATIONS):
            found.append(f"allocation {self.allocation!r} is none of {', '.join(ALLOCATIONS)}")
        if self.target not in TARGETS:
            found.append(f"target {self.target!r} is none of {', '.join(TARGETS)}")
        if self.target == VLLM and self.allocation == LAYERS:
            found.append("vllm takes one layout for all layers, not allocation over layers")
        return found

    def _bits_problems(self) -> list[str]:
        found = []
        for name in ("bits", "v_bits", "k_bits", "k_rotary_bits"):
            bits = getattr(self, name)
            if bits is not None and bits not in BITS and (name, bits) != ("bits", AUTO):
                found.append(f"{name} {bits} is none of {', '.join(map(str, BITS))}")
        if found:
            return found
        for name in ("sinks", "window"):
            tokens = getattr(self, name) or 0
            if tokens < 0:
                found.append(f"{name} {tokens} is below zero")
            if tokens and not self.packs:
                found.append(f"{name} without bits: every token stays in 16 bits")
        exact = (self.sinks or 0) + (self.window or 0)
        if self.packs and exact >= TYPICAL_TOKENS:
            found.append(f"sinks and window leave none of {TYPICAL_TOKENS:,} tokens to be packed")
        if self.bits == AUTO and self.kv_budget is None:
            found.append("bits auto needs a kv_budget to spend")
        if self.packs and self.target == VLLM:
            found.append("vllm has no cache of packed latents")
        return found

    def _rotary_problems(self, groups: int, shape: ModelShape) -> list[str]:
        kept, k_dim = self.k_rotary_dim, self.k_dim
        if kept is None:
            return []
        if k_dim is None:
            return ["k_rotary_dim without k_dim: K stays whole"]
        if shape.rotary_dim == shape.head_dim:
            return ["k_rotary_dim: RoPE rotates whole heads here, keys are narrowed behind it"]
        found = []
        if kept < 0 or kept > k_dim:
            found.append(f"k_rotary_dim {kept} is not between 0 and k_dim {k_dim}")
        if kept > shape.kv_heads * shape.rotary_dim:
            most = shape.kv_heads * shape.rotary_dim
            found.append(f"k_rotary_dim {kept} is above the model's {most}")
        if kept % (2 * groups):
            found.append(f"k_rotary_dim {kept} is not divisible by 2 times {groups} groups")
        rest = shape.kv_heads * (shape.head_dim - shape.rotary_dim)
        if k_dim - kept > rest:
            found.append(f"k_dim {k_dim} less {kept} rotary ones is above the other {rest}")
        return found

    def _vllm_problems(self, v_groups: int, k_groups: int, shape: ModelShape) -> list[str]:
        found = []
        if self.kv_budget is not None:
            if self.v_groups and self.k_groups and v_groups != k_groups:
                found.append(f"vllm takes one number of groups, not {k_groups} and {v_groups}")
            return found
        v_dim, k_dim = self.v_dim or shape.kv_dim, self.k_dim or shape.kv_dim
        if v_groups != k_groups:
            found.append(
                f"vllm takes one number of groups, not {k_groups} of K and {v_groups} of V"
            )
        elif v_dim != k_dim:
            found.append(f"vllm takes K and V of one width, not {k_dim} and {v_dim}")
        return found

    def _keeps_all_rotary(self, shape: ModelShape) -> bool:
        """Say whether the rotary part of K is settled by the shape."""
        if shape.rotary_dim == shape.head_dim or self.k_dim == shape.kv_dim:
            return True
        whole = shape.kv_heads * shape.rotary_dim
        if self.k_rotary_dim is not None:
            return self.k_rotary_dim in (0, whole)
        return self.groups(shape)[1] == shape.kv_heads and (self.k_dim or 0) >= whole


def width_problems(name: str, width: int | None, groups: int, shape: ModelShape) -> list[str]:
    """Say everything that forbids a width over all groups of one side."""
    if width is None:
        return []
    found = []
    if width <= 0:
        found.append(f"{name} {width} is not above zero")
    if width > shape.kv_dim:
        found.append(f"{name} {width} is above the model's {shape.kv_dim}")
    if width % groups:
        heads = "key/value heads" if groups == shape.kv_heads else "groups"
        found.append(f"{name} {width} is not divisible by {groups} {heads}")
    return found


def suggestion(request: Request, shape: ModelShape) -> str:
    """Say which values would fit, of those that a request got wrong."""
    counts = [n for n in range(1, shape.kv_heads + 1) if shape.kv_heads % n == 0]
    wrong = {n for n in (request.v_groups, request.k_groups) if n is not None} - set(counts)
    tries = [f"groups {_listed(counts)}"] if wrong else []
    for side, groups in zip("vk", request.groups(shape), strict=True):
        width = getattr(request, f"{side}_dim")
        if groups in counts and width_problems(f"{side}_dim", width, groups, shape):
            fits = range(STEP * groups, shape.kv_dim + 1, STEP * groups)
            tries.append(f"--{side}-dim with one of {_listed(list(fits))}")
    return f"try {' and '.join(tries)}" if tries else ""


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values[-8:]))


def _groups_problems(
    side: str, groups: int | None, dim: int | None, budget: float | None, shape: ModelShape
) -> list[str]:
    if groups is None:
        return []
    found = []
    if groups < 1 or shape.kv_heads % groups:
        found.append(f"{side}_groups {groups} does not divide {shape.kv_heads} key/value heads")
    if dim is None and budget is None:
        found.append(f"{side}_groups without {side}_dim: {side.upper()} stays whole")
    return found
