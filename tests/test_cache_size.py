"""The measured cache, of models whose cache is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from vdcompress.cache_size import CacheSize, measure_cache
from vdcompress.errors import ModelError

LAYERS, HEADS, WIDTH = 3, 4, 8
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": HEADS * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 32,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
PROMPT = torch.arange(1, 41)


@pytest.fixture(scope="module")
def neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).eval()


def test_a_stock_cache_in_float32(neox: Any) -> None:
    found = measure_cache(neox, PROMPT, new_tokens=16)

    numbers = 2 * LAYERS * HEADS * WIDTH
    tokens = 40 + 16 - 1  # the last new token is never read
    assert found == CacheSize(
        bytes_per_token=2 * numbers,
        tokens=tokens,
        bytes=4 * numbers * tokens,
        allocated=4 * numbers * tokens,
        dtype="float32",
    )
    assert found.stored_bytes_per_token == 4 * numbers


def test_grouped_queries_in_bfloat16_keep_fewer_heads() -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=2)
    llama = LlamaForCausalLM(config).to(torch.bfloat16).eval()

    found = measure_cache(llama, PROMPT[None], new_tokens=4)

    assert found.bytes_per_token == found.stored_bytes_per_token == 2 * 2 * LAYERS * 2 * WIDTH
    assert (found.tokens, found.dtype) == (43, "bfloat16")


def test_the_prompt_is_cut_and_generation_does_not_stop_early(neox: Any) -> None:
    assert measure_cache(neox, PROMPT, prompt_tokens=10, new_tokens=5).tokens == 14


def test_a_tokenizer_makes_the_prompt(neox: Any, tiny_tokenizer: Any) -> None:
    found = measure_cache(neox, tiny_tokenizer, prompt_tokens=64, new_tokens=2)

    assert found.tokens == 65


class SpareLayer:
    """A layer that allocated more than it stores, as growing caches do."""

    def __init__(self, v_width: int) -> None:
        self.keys = torch.zeros(1, HEADS, 100, WIDTH)[:, :, :20]
        self.values = torch.zeros(1, HEADS, 100, v_width)[:, :, :20]


class PackedLayer:
    """A layer without key and value tensors: only it knows its size."""

    keys = values = None
    dtype = torch.float32

    def nbytes(self) -> int:
        return 160

    def exact_nbytes(self) -> int:
        return 40

    def nbytes_allocated(self) -> int:
        return 200


def with_cache(layers: list[Any], tokens: int = 20) -> Any:
    cache = SimpleNamespace(layers=layers, get_seq_length=lambda: tokens)
    output = {"past_key_values": cache}
    return SimpleNamespace(generate=lambda *_, **__: output, device=torch.device("cpu"))


def test_views_count_what_they_show_and_allocated_what_lies_behind() -> None:
    found = measure_cache(with_cache([SpareLayer(WIDTH - 3)] * 2), PROMPT)

    numbers = 2 * HEADS * (2 * WIDTH - 3)
    assert found.bytes == 4 * numbers * 20
    assert found.allocated == 4 * numbers * 100
    assert found.bytes_per_token == 2 * numbers


def test_packed_layers_count_as_they_are() -> None:
    found = measure_cache(with_cache([PackedLayer(), SpareLayer(WIDTH)]), PROMPT)

    assert found.bytes_per_token == (160 - 40 / 2) / 20 + 2 * HEADS * 2 * WIDTH
    assert found.bytes == 160 + 4 * HEADS * 2 * WIDTH * 20
    assert found.allocated == 200 + 4 * HEADS * 2 * WIDTH * 100


def test_no_cache_is_an_error() -> None:
    with pytest.raises(ModelError, match="no cache"):
        measure_cache(with_cache([], tokens=0), PROMPT)
