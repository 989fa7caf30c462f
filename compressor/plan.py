"""Decide what the cache of each layer keeps: the :class:`Plan`, before a weight is touched."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from vdcompress.errors import PlanError
from vdcompress.modeling import layout as layouts
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart

FORMAT = 1
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
T = TypeVar("T")


@dataclass(frozen=True)
class ModelShape:
    """What a plan must know of the base model; a family adapter reads it from the config alone.

    Attributes:
        family: the base's ``config.model_type``.
        layers: number of attention layers.
        hidden: width of the residual stream.
        heads: query heads per layer.
        kv_heads: key/value heads per layer.
        head_dim: width of one head (d).
        rotary_dim: how many of a head's dimensions RoPE rotates, ``2 * len(inv_freq)``.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int

    @property
    def kv_dim(self) -> int:
        """Numbers of K, and of V, per token and layer."""
        return self.kv_heads * self.head_dim

    def full_layout(self) -> LayerLayout:
        """Return the layout that keeps everything."""
        pairs = self.rotary_dim // 2
        return LayerLayout(
            v=Part(self.kv_heads, self.head_dim),
            k_nope=NopePart(self.kv_heads, self.head_dim - self.rotary_dim),
            k_rotary=RotaryPart(self.kv_heads, self.rotary_dim, frequencies=tuple(range(pairs))),
        )


@dataclass(frozen=True)
class Start:
    """How compressed weights are initialised.

    Attributes:
        initializer: name of a module in ``vdcompress.initializers``.
        refit: ``none``, or ``local`` for the joint refit of the output projection.
        alternate: rounds of alternation after the refit.
        seed: of the random initialiser.
    """

    initializer: str = "optimal"
    refit: str = "local"
    alternate: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Plan:
    """The whole decision, a frozen value: JSON both ways, saved in the artefact.

    Attributes:
        shape: of the base model.
        layers: one layout for each layer of the base.
        start: how the new weights are found.
    """

    shape: ModelShape
    layers: tuple[LayerLayout, ...]
    start: Start = Start()

    def common(self, read: Callable[[LayerLayout], T]) -> T | None:
        """Return the value that ``read`` finds in every layer, None where layers differ."""
        values = {read(layer) for layer in self.layers}
        return values.pop() if len(values) == 1 else None

    def cache_bytes(self, tokens: int, dtype: str = "bfloat16") -> int:
        """Exact bytes that the cache holds for ``tokens`` tokens of one sequence.

        Args:
            tokens: tokens stored.
            dtype: of the latents, ``float32``, ``float16`` or ``bfloat16``.
        """
        numbers = sum(layer.v_dim + layer.k_dim for layer in self.layers)
        return tokens * numbers * DTYPE_BYTES[dtype]

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token with 16-bit latents."""
        return self.cache_bytes(1)

    @property
    def base_bytes_per_token(self) -> int:
        """Bytes per token of the base model's 16-bit cache."""
        return 2 * self.shape.layers * 2 * self.shape.kv_dim

    @property
    def reduction(self) -> float:
        """Which fraction of the base's cache is gone."""
        return 1 - self.bytes_per_token / self.base_bytes_per_token

    def to_json(self) -> dict[str, Any]:
        """Return plain values; scalars are null where layers differ and are not read back."""
        bits = {"v": lambda la: la.v.bits, "k": lambda la: (la.k_nope.bits, la.k_rotary.bits)}
        k_bits = self.common(bits["k"])
        return {
            "format": FORMAT,
            "v_dim": self.common(lambda la: la.v_dim),
            "k_dim": self.common(lambda la: la.k_dim),
            "v_groups": self.common(lambda la: la.v_groups),
            "k_groups": self.common(lambda la: la.k_groups),
            "v_bits": self.common(bits["v"]),
            "k_bits": k_bits[0] if k_bits and k_bits[0] == k_bits[1] else None,
            "shape": asdict(self.shape),
            "start": asdict(self.start),
            "layers": [layer.to_json() for layer in self.layers],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: for a future format, missing or unknown fields, or an unsound layout.
        """
        found = data.get("format") if isinstance(data, Mapping) else None
        if found != FORMAT:
            raise PlanError(
                [f"plan format {found!r} is not {FORMAT}"],
                "install the vdcompress that wrote it",
            )
        try:
            plan = cls(
                shape=ModelShape(**data["shape"]),
                layers=tuple(LayerLayout.from_json(layer) for layer in data["layers"]),
                start=Start(**data["start"]),
            )
            plan.validate()
        except (KeyError, TypeError) as error:
            raise PlanError([f"not a plan: {error}"]) from error
        return plan

    def dumps(self) -> str:
        """Return :meth:`to_json` as text."""
        return json.dumps(self.to_json(), indent=2)

    def validate(self) -> None:
        """Raise one :class:`PlanError` that names everything wrong with this plan."""
        shape = self.shape
        found = []
        if len(self.layers) != shape.layers:
            found.append(f"the plan has {len(self.layers)} layers, the model {shape.layers}")
        for index, layer in enumerate(self.layers):
            reasons = layouts.problems(
                layer,
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                frequencies=shape.rotary_dim // 2,
            )
            found += [f"layer {index}: {reason}" for reason in reasons]
        if found:
            raise PlanError(found)


def make_plan(shape: ModelShape, *, v_dim: int, start: Start | None = None) -> Plan:
    """Plan a uniform width of V with one latent per key/value head; K stays as it is.

    Args:
        shape: of the base model (``load_config(model).shape`` or ``base.shape``).
        v_dim: width of V per token and layer over all key/value heads.
        start: how the new weights are found.

    Raises:
        PlanError: with every reason why ``v_dim`` does not fit (exit 2).
    """
    found = width_problems(shape, v_dim)
    if found:
        step = 8 * shape.kv_heads
        fits = [str(width) for width in range(step, shape.kv_dim + 1, step)]
        raise PlanError(found, f"try --v-dim with one of {', '.join(fits[-8:])}")
    full = shape.full_layout()
    layer = LayerLayout(Part(shape.kv_heads, v_dim // shape.kv_heads), full.k_nope, full.k_rotary)
    plan = Plan(shape, (layer,) * shape.layers, start or Start())
    plan.validate()
    return plan


def width_problems(shape: ModelShape, v_dim: int) -> list[str]:
    """Say everything that forbids a ``v_dim``."""
    found = []
    if v_dim <= 0:
        found.append(f"v_dim {v_dim} is not above zero")
    if v_dim > shape.kv_dim:
        found.append(f"v_dim {v_dim} is above the model's {shape.kv_dim}")
    if v_dim % shape.kv_heads:
        found.append(f"v_dim {v_dim} is not divisible by {shape.kv_heads} key/value heads")
    return found


def width_warnings(plan: Plan) -> list[str]:
    """Say what is allowed but costs speed: widths that are not multiples of 8 per latent."""
    odd = sorted({layer.v.width for layer in plan.layers if layer.v.width % 8})
    return [
        f"a latent of {width} numbers is not a multiple of 8: fast kernels and serving engines "
        "will not take it"
        for width in odd
    ]
