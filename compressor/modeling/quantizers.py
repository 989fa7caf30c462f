"""Which quantiser a name stands for."""

from __future__ import annotations

from .quantizer import Quantizer
from .quantizer_affine import AffineQuantizer
from .quantizer_normal import NormalQuantizer
from .schemes import NORMAL, PER_CHANNEL, PER_TOKEN, SCHEMES

ROUNDING: dict[str, type[Quantizer]] = {
    PER_TOKEN.name: AffineQuantizer,
    PER_CHANNEL.name: AffineQuantizer,
    NORMAL.name: NormalQuantizer,
}


def quantizer(name: str, bits: int) -> Quantizer:
    """Return the quantiser of a part's ``quantizer`` and ``bits``.

    Raises:
        ValueError: no quantiser has this name, or it does not know so many bits.
    """
    scheme = SCHEMES.get(name)
    if scheme is None:
        raise ValueError(f"quantizer {name!r} is none of {', '.join(SCHEMES)}")
    if bits not in scheme.bits:
        raise ValueError(f"quantizer {name} rounds to {', '.join(map(str, scheme.bits))} bits")
    return ROUNDING[name](scheme, bits)
