"""What each quantiser stores, in exact bytes: pure Python, read by plans and by caches alike.

Numbers share a scale in blocks of tokens by dimensions. A scale is an fp16 number. An asymmetric
scheme also has a zero point of one byte, a code of eight bits whatever the number's:
``x = scale * (code - zero * 2**bits / 256)``. A scheme of normal numbers has none.

The first tokens (``sinks``) and the newest ones (``window``) of a sequence stay as they are, in the
dtype of the model; so do those that do not fill a block of tokens yet. Which these are depends on
the number of tokens alone: a cache holds the same after one token at a time as after one prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

QUANTIZED_BITS = (8, 4, 3, 2)
BLOCK = 64
GROUP_TOKENS = 32
SCALE_BYTES = 2


def codes_per_word(bits: int) -> int:
    """Return how many codes fill whole bytes."""
    return 8 // math.gcd(8, bits)


def word_bytes(bits: int) -> int:
    """Return how many bytes :func:`codes_per_word` codes fill."""
    return bits // math.gcd(8, bits)


def zero_unit(bits: int) -> float:
    """Return what a zero point's byte counts, in codes."""
    return 2.0**bits / 256


def packed_width(n: int, bits: int) -> int:
    """Return the bytes of one latent's n codes."""
    return -(-n // codes_per_word(bits)) * word_bytes(bits)


def packed_tokens(tokens: int, token_block: int, sinks: int, window: int) -> int:
    """Return how many of a sequence's tokens are packed; they follow its sinks.

    Args:
        tokens: of the sequence.
        token_block: tokens that share a scale.
        sinks: first tokens that are not packed.
        window: newest tokens that are not packed.
    """
    return max(0, tokens - sinks - window) // token_block * token_block


@dataclass(frozen=True)
class Scheme:
    """A way to store numbers in few bits.

    Attributes:
        name: as in ``Part.quantizer``.
        token_block: tokens that share a scale.
        dim_block: most dimensions of a latent that share a scale.
        zero_bytes: bytes of a zero point.
        bits: numbers of bits that it knows.
    """

    name: str
    token_block: int = 1
    dim_block: int = BLOCK
    zero_bytes: int = 1
    bits: tuple[int, ...] = QUANTIZED_BITS

    def blocks(self, width: int) -> int:
        """Return into how many equal blocks of dimensions a latent is cut, as few as can be."""
        fewest = -(-width // self.dim_block)
        return next(count for count in range(fewest, width + 1) if width % count == 0)

    def packed_bytes(self, tokens: int, width: int, bits: int) -> int:
        """Return the bytes of the codes, scales and zero points of so many packed tokens.

        Args:
            tokens: a multiple of ``token_block``.
            width: numbers per latent.
            bits: of a number.
        """
        if not width:
            return 0
        scales = tokens // self.token_block * self.blocks(width)
        return tokens * packed_width(width, bits) + scales * (SCALE_BYTES + self.zero_bytes)

    def stored_bytes(
        self,
        tokens: int,
        width: int,
        bits: int,
        *,
        number_bytes: int = 2,
        sinks: int = 0,
        window: int = 0,
    ) -> int:
        """Return the exact bytes of one latent over a sequence.

        Args:
            tokens: of the sequence.
            width: numbers per latent.
            bits: of a packed number.
            number_bytes: of a number that is not packed.
            sinks: first tokens that are not packed.
            window: newest tokens that are not packed.
        """
        packed = packed_tokens(tokens, self.token_block, sinks, window)
        exact = (tokens - packed) * width * number_bytes
        return exact + self.packed_bytes(packed, width, bits)


PER_TOKEN = Scheme("per_token")
PER_CHANNEL = Scheme("per_channel", token_block=GROUP_TOKENS, dim_block=1)
NORMAL = Scheme("normal", zero_bytes=0, bits=(4, 3, 2))
SCHEMES = {scheme.name: scheme for scheme in (PER_TOKEN, PER_CHANNEL, NORMAL)}
# By bits: of rotated latents, and of keys that RoPE turns; bench/quantizers.py compares them.
DEFAULTS = {8: PER_TOKEN.name, 4: PER_TOKEN.name, 3: NORMAL.name, 2: NORMAL.name}
ROTARY_DEFAULTS = {8: PER_TOKEN.name} | dict.fromkeys((4, 3, 2), PER_CHANNEL.name)
