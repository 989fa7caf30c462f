"""Decide what the cache of each layer keeps: the :class:`Plan`, before a weight is touched."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from vdcompress import serving
from vdcompress.bits import exact_tokens
from vdcompress.budget import layers_for
from vdcompress.errors import PlanError
from vdcompress.modeling import layout as layouts
from vdcompress.modeling.layout import TYPICAL_TOKENS, LayerLayout, NopePart, Part, RotaryPart
from vdcompress.request import VLLM, Request

if TYPE_CHECKING:
    from vdcompress.gains import LayerGains

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
        seed: of the random initialiser, and of rotations.
        rotate: whether packed latents are rotated; None where numbers of a token share a scale.
    """

    initializer: str = "optimal"
    refit: str = "local"
    alternate: int = 2
    seed: int = 0
    rotate: bool | None = None


@dataclass(frozen=True)
class Plan:
    """The whole decision, a frozen value: JSON both ways, saved in the artefact.

    Attributes:
        shape: of the base model.
        layers: one layout for each layer of the base.
        start: how the new weights are found.
        sinks: first tokens of a sequence that quantisers leave as they are.
        window: newest tokens that they leave as they are.
    """

    shape: ModelShape
    layers: tuple[LayerLayout, ...]
    start: Start = Start()
    sinks: int = 0
    window: int = 0

    @property
    def packed(self) -> bool:
        """Whether a quantiser packs any part of any layer."""
        return any(layer.packed for layer in self.layers)

    @property
    def depends_on_length(self) -> bool:
        """Whether a token's share of the bytes depends on the length of its sequence."""
        return self.cache_bytes(TYPICAL_TOKENS) != TYPICAL_TOKENS * self.cache_bytes(1)

    def common(self, read: Callable[[LayerLayout], T]) -> T | None:
        """Return the value that ``read`` finds in every layer, None where layers differ."""
        values = {read(layer) for layer in self.layers}
        return values.pop() if len(values) == 1 else None

    def cache_bytes(self, tokens: int, dtype: str = "bfloat16") -> int:
        """Exact bytes that the cache holds for ``tokens`` tokens of one sequence.

        Scales, zero points and tokens that are not packed are counted.

        Args:
            tokens: tokens stored.
            dtype: of numbers that are not packed, ``float32``, ``float16`` or ``bfloat16``.
        """
        return sum(
            part.cache_bytes(
                tokens,
                number_bytes=DTYPE_BYTES[dtype],
                sinks=self.sinks,
                window=self.window,
            )
            for layer in self.layers
            for part in layer.parts
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token of 16-bit latents and of packed ones, over 2048 tokens, rounded up.

        Sinks, a window or a block of tokens that is not full make a token's share depend on the
        length of the sequence; without them it does not.
        """
        return -(-self.cache_bytes(TYPICAL_TOKENS) // TYPICAL_TOKENS)

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
        k_bits = self.common(lambda la: tuple(p.bits for p in (la.k_nope, la.k_rotary) if p.width))
        return {
            "format": FORMAT,
            "v_dim": self.common(lambda la: la.v_dim),
            "k_dim": self.common(lambda la: la.k_dim),
            "k_rotary_dim": self.common(lambda la: la.k_rotary.dim),
            "v_groups": self.common(lambda la: la.v_groups),
            "k_groups": self.common(lambda la: la.k_groups),
            "v_bits": self.common(lambda la: la.v.bits),
            "k_bits": k_bits[0] if k_bits and len(set(k_bits)) == 1 else None,
            "sinks": self.sinks,
            "window": self.window,
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
                sinks=data.get("sinks", 0),
                window=data.get("window", 0),
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
        for name in ("sinks", "window"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                found.append(f"{name} {getattr(self, name)!r} is not a number of tokens")
        if found:
            raise PlanError(found)


def make_plan(
    shape: ModelShape,
    *,
    v_dim: int | None = None,
    k_dim: int | None = None,
    groups: int | None = None,
    v_groups: int | None = None,
    k_groups: int | None = None,
    k_rotary_dim: int | None = None,
    v_bits: int | None = None,
    k_bits: int | None = None,
    k_rotary_bits: int | None = None,
    sinks: int | None = None,
    window: int | None = None,
    start: Start | None = None,
) -> Plan:
    """Plan uniform widths from the shape alone; what is not named stays as it is.

    Args:
        shape: of the base model (``load_config(model).shape`` or ``base.shape``).
        v_dim: width of V per token and layer over all groups.
        k_dim: width of K likewise, rotary and other dimensions together.
        groups: latents per layer of each side that changes; None is one per key/value head.
        v_groups: the same for V alone.
        k_groups: the same for K alone.
        k_rotary_dim: how much of ``k_dim`` is rotary; None keeps all of it, one latent per head.
            A multiple of the base's frequencies keeps each of them equally often.
        v_bits: of V's latents, 16, 8, 4, 3 or 2; None is 16.
        k_bits: of K's likewise.
        k_rotary_bits: of the rotary part of K; None is ``k_bits``, but at least 8.
        sinks: first tokens of a sequence that stay in 16 bits; None is 4 where anything has fewer
            than 8 bits.
        window: newest tokens that stay in 16 bits; None is 32 there.
        start: how the new weights are found.

    Raises:
        PlanError: with every reason why it does not fit (exit 2), or because the choice of
            rotary frequencies needs gains (:func:`plan_for`).
    """
    request = Request.of(
        groups=groups,
        v_dim=v_dim,
        k_dim=k_dim,
        v_groups=v_groups,
        k_groups=k_groups,
        k_rotary_dim=k_rotary_dim,
        v_bits=v_bits,
        k_bits=k_bits,
        k_rotary_bits=k_rotary_bits,
        sinks=sinks,
        window=window,
    )
    return plan_for(shape, request, start)


def plan_for(
    shape: ModelShape,
    request: Request,
    start: Start | None = None,
    gains: Sequence[LayerGains] | None = None,
) -> Plan:
    """Plan what a request asks for.

    Args:
        shape: of the base model.
        request: widths, groups or a budget.
        start: how the new weights are found.
        gains: what each layer's latents leave out at each width; None where
            :meth:`Request.needs_gains` says that the shape is enough.

    Raises:
        PlanError: with every reason why it does not fit (exit 2).
    """
    request.require(shape)
    if gains is not None and len(gains) != shape.layers:
        raise PlanError([f"gains of {len(gains)} layers, the model has {shape.layers}"])
    try:
        layers = layers_for(shape, request, gains)
    except KeyError as error:
        raise PlanError([f"the gains hold nothing for {error} groups"]) from error
    sinks, window = exact_tokens(request)
    plan = Plan(shape, layers, start or Start(), sinks=sinks, window=window)
    plan.validate()
    if request.target == VLLM:
        _require_vllm(plan)
    return plan


def _require_vllm(plan: Plan) -> None:
    """Raise :class:`PlanError` unless one of vLLM's backends takes this layout."""
    found = [v for v in serving.verdicts(plan.layers) if v.engine.startswith("vLLM")]
    if not any(verdict.serves for verdict in found):
        reasons = "; ".join(f"{verdict.backend} {verdict.note}" for verdict in found)
        raise PlanError(["no backend of vLLM takes this plan"], reasons)


def width_warnings(plan: Plan) -> list[str]:
    """Say what is allowed but costs speed: widths that are not multiples of 8 per latent."""
    full = plan.shape.full_layout()
    found = {layer.v.width for layer in plan.layers if layer.v != full.v}
    for layer in plan.layers:
        if (layer.k_nope, layer.k_rotary) != (full.k_nope, full.k_rotary):
            found.add(layer.k_head_dim)
    return [
        f"a latent of {width} numbers is not a multiple of 8: fast kernels and serving engines "
        "will not take it"
        for width in sorted(found)
        if width % 8
    ]
