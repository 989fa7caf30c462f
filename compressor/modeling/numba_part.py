"""What numba's kernels are given of a part of a span: a row of whole numbers, in this order."""

from __future__ import annotations

FORMS = (FLOAT32, BFLOAT16, FLOAT16, TOKEN_FORM, NORMAL_FORM, CHANNEL_FORM) = range(6)
FIELDS = (  # addresses are those of the first token wanted; strides are in bytes
    START, SPAN_TOKENS, FORM, BITS, WIDTH, LATENTS, FIRST, BLOCKS, ROW, CODES, CODES_B, CODES_G,
    SCALE, SCALE_B, SCALE_G, ZERO, ZERO_B, ZERO_G,
) = range(18)  # fmt: skip
TOKENS = 32  # a multiple of every scheme's block of tokens
