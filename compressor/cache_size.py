"""Measure the cache that ``generate()`` really leaves behind, in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcompress.errors import ModelError
from vdcompress.modeling.own_cache import CACHE_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROMPT = "The key and value cache of a language model grows by one entry with every token. "


@dataclass(frozen=True)
class CacheSize:
    """The cache of one sequence after ``generate()``.

    Attributes:
        bytes_per_token: with 16-bit numbers, the unit of :attr:`Plan.bytes_per_token`; what is
            packed in fewer bits counts as it is.
        tokens: tokens in the cache.
        bytes: of those tokens, in the cache's own dtype.
        allocated: bytes that the cache holds in memory, spare capacity included.
        dtype: of the cache's numbers, such as ``float32``.
    """

    bytes_per_token: float
    tokens: int
    bytes: int
    allocated: int
    dtype: str

    @property
    def stored_bytes_per_token(self) -> float:
        """Bytes per token in the cache's own dtype."""
        return self.bytes / self.tokens


def measure_cache(
    model: PreTrainedModel,
    tokens: PreTrainedTokenizerBase | Tensor,
    *,
    prompt_tokens: int = 64,
    new_tokens: int = 16,
) -> CacheSize:
    """Generate greedily and measure the tensors left in the cache.

    Args:
        model: any causal language model of transformers.
        tokens: a prompt, int64, shape [n] or [1, n], or a tokenizer to make one with.
        prompt_tokens: most tokens of the prompt.
        new_tokens: tokens to generate.

    Raises:
        ModelError: the model left no cache.
    """
    ids = tokens if isinstance(tokens, Tensor) else _prompt(tokens, prompt_tokens)
    ids = ids.reshape(1, -1)[:, :prompt_tokens].to(model.device)
    generator: Any = model
    output = generator.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    cache = next((output[name] for name in CACHE_NAMES if name in output), None)
    if cache is None or not cache.get_seq_length():
        raise ModelError("the model left no cache after generate()")
    return _size(cache)


def _prompt(tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    ids = tokenizer(_PROMPT * (length // 8 + 1), add_special_tokens=False, verbose=False)
    return torch.tensor(ids["input_ids"][:length], dtype=torch.long)


def _size(cache: Any) -> CacheSize:
    """Sum over the layers; the cache's own ``nbytes`` methods are used for packed layers only."""
    tokens = int(cache.get_seq_length())
    stored = sixteen = allocated = 0
    dtype = ""
    for layer in cache.layers:
        views = [getattr(layer, name, None) for name in ("keys", "values")]
        tensors = [view for view in views if isinstance(view, Tensor)]
        if len(tensors) < len(views):
            stored += int(layer.nbytes())
            exact = int(layer.exact_nbytes())
            sixteen += int(layer.nbytes()) - exact + exact * 2 // layer.dtype.itemsize
            allocated += int(layer.nbytes_allocated())
            dtype = str(layer.dtype).removeprefix("torch.")
            continue
        stored += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        sixteen += sum(tensor.numel() * 2 for tensor in tensors)
        allocated += _storage(tensors)
        dtype = str(tensors[0].dtype).removeprefix("torch.")
    return CacheSize(sixteen / tokens, tokens, stored, allocated, dtype)


def _storage(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages behind some views."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
