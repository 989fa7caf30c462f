"""Run a model that does not fit into memory: one layer's weights at a time, over all windows.

The model stands on the meta device. Its own body runs each step, with one layer in place of all
and with the final norm only in the last step, so that masks, rotary tables and residuals are the
model's own, base or compressed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vdcompress.calibrate import LayerSums, listening, require_finite
from vdcompress.errors import ModelError
from vdcompress.families.base import Family
from vdcompress.memory import give_back
from vdcompress.shards import Checkpoint
from vdcompress.statistics import LayerStatistics


class HiddenStates:
    """The residual stream of token windows [n, t, hidden], float32, in memory or in a file.

    Args:
        windows: n.
        length: t.
        width: hidden.
        folder: keep them in a temporary file in this folder; None keeps them in memory.
    """

    def __init__(self, windows: int, length: int, width: int, folder: Path | None = None) -> None:
        self.shape = (windows, length, width)
        self._file: BufferedRandom | None = None
        self._memory: Tensor | None = None
        if folder is None:
            self._memory = torch.empty(self.shape)
        else:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def __len__(self) -> int:
        return self.shape[0]

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give memory and disk back."""
        self._memory = None
        if self._file is not None:
            self._file.close()

    def read(self, start: int, stop: int) -> Tensor:
        """Return windows ``start`` to ``stop - 1``, [b, t, hidden]."""
        stop = min(stop, len(self))
        if self._memory is not None:
            return self._memory[start:stop]
        found = torch.empty(stop - start, *self.shape[1:])
        view = found.numpy().data.cast("B")
        if self._seek(start).readinto(view) != len(view):
            raise OSError("the temporary file of the hidden states was cut")
        return found

    def write(self, start: int, states: Tensor) -> None:
        """Replace the windows from ``start`` on by ``states`` [b, t, hidden]."""
        states = states.detach().to("cpu", torch.float32).contiguous()
        if self._memory is not None:
            self._memory[start : start + len(states)] = states
        else:
            self._seek(start).write(states.numpy().data.cast("B"))

    def _seek(self, window: int) -> BufferedRandom:
        if self._file is None:
            raise ValueError("these hidden states are closed")
        self._file.seek(4 * window * self.shape[1] * self.shape[2])
        return self._file


class Stack:
    """A causal language model on the meta device whose weights come from a checkpoint as needed.

    Args:
        model: on the meta device, base or compressed.
        layers_prefix: what stands before a layer's number in names, such as ``model.layers``.
        checkpoint: its weights; every tensor of the model must be there, in its shape.
        device: where to calculate.

    Raises:
        ModelError: a tensor is missing or of another shape.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers_prefix: str,
        checkpoint: Checkpoint,
        device: str = "cpu",
    ) -> None:
        self.model, self.checkpoint, self.device = model.eval(), checkpoint, device
        body: Any = model.base_model
        self._body = body
        parent, _, self._slot = layers_prefix.rpartition(".")
        self._prefix = f"{layers_prefix}."
        self._parent = model.get_submodule(parent)
        self._layers = list(model.get_submodule(layers_prefix).children())
        self._names = {id(module): name for name, module in model.named_modules()}
        self._norms = {
            name: module
            for name, module in body.named_children()
            if module is not model.get_submodule(layers_prefix)
            and module is not body.get_input_embeddings()
            and any(True for _ in module.parameters())
        }
        body.rotary_emb = type(body.rotary_emb)(body.config).to(device)
        tied = dict(model.all_tied_weights_keys) if model.config.tie_word_embeddings else {}
        head = f"{self._names[id(model.get_output_embeddings())]}.weight"
        self.embedding_name = f"{self._names[id(body.get_input_embeddings())]}.weight"
        self.head_name = tied.get(head, head)
        checkpoint.require(stored_shapes(model))

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def width(self) -> int:
        """Numbers of the residual stream."""
        return int(self.model.config.hidden_size)

    def embed(self, windows: Tensor, hidden: HiddenStates) -> None:
        """Fill ``hidden`` with the embeddings of token windows [n, t]; only their rows are read.

        Raises:
            ModelError: a token is not of the vocabulary.
        """
        largest, vocabulary = int(windows.max()), int(self.model.config.vocab_size)
        if largest >= vocabulary:
            raise ModelError(
                f"token {largest} is not of the model's vocabulary of {vocabulary}",
                "the tokenizer and the weights are of different models",
            )
        for index, window in enumerate(windows):
            tokens, places = window.unique(return_inverse=True)
            rows = self.checkpoint.rows(self.embedding_name, tokens.tolist()).float()
            hidden.write(index, rows[places][None])

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Give one layer its weights in float32 for the time of a block; yields the layer.

        Until the block ends, ``model`` has this layer alone.
        """
        module = self._layers[index]
        self._fill(module, f"{self._prefix}{index}.")
        try:
            with self._only([module]):
                yield module
        finally:
            module.to("meta")
            give_back()

    def forget_all_but(self, kept: nn.Module) -> None:
        """Drop the weights of the layer that :meth:`layer` holds, but those of one of its parts."""
        for module in self._parent.get_submodule(self._slot).modules():
            if kept not in module.modules() and module not in kept.modules():
                module.to("meta")
        give_back()

    def recall(self) -> None:
        """Read again what :meth:`forget_all_but` dropped of the layer that :meth:`layer` holds."""
        (module,) = self._parent.get_submodule(self._slot).children()
        self._fill(module, f"{self._prefix}{self._layers.index(module)}.")

    def run(self, hidden: HiddenStates, *, advance: bool = True) -> Iterator[int]:
        """Pass all windows through the layer that :meth:`layer` holds; yields how many are done.

        One at a time, as calibration and evaluation do: sums come out the same to the last bit.

        Args:
            hidden: what the layer takes.
            advance: replace it by what the layer returns.
        """
        for window in range(len(hidden)):
            with torch.inference_mode():
                states = self._through(hidden.read(window, window + 1))
                if advance:
                    hidden.write(window, states)
            yield window + 1

    def finish(self, hidden: HiddenStates) -> None:
        """Pass all windows through what the body does after its layers."""
        for name, norm in self._norms.items():
            self._fill(norm, f"{self._names[id(self._body)]}.{name}.")
        try:
            with self._only([], last=True):
                for _ in self.run(hidden):
                    pass
        finally:
            for norm in self._norms.values():
                norm.to("meta")
            give_back()

    def head_blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """Yield so many rows of the output embeddings at a time, float32, and where they start."""
        size = rows * self.width * self.checkpoint.itemsize(self.head_name)
        for start, block in self.checkpoint.blocks(self.head_name, size):
            yield start, block.to(self.device, torch.float32)
            give_back()

    def _through(self, states: Tensor) -> Tensor:
        output = self._body(inputs_embeds=states.to(self.device), use_cache=False)
        return torch.as_tensor(output.last_hidden_state)

    def _fill(self, module: nn.Module, prefix: str) -> None:
        state = {
            name: self.checkpoint.read(prefix + name).to(self.device, torch.float32)
            for name in module.state_dict()
        }
        module.load_state_dict(state, strict=True, assign=True)

    @contextmanager
    def _only(self, layers: list[nn.Module], *, last: bool = False) -> Iterator[None]:
        """Leave the body these layers alone, and its norm in the last step only."""
        setattr(self._parent, self._slot, nn.ModuleList(layers))
        if not last:
            for name in self._norms:
                setattr(self._body, name, nn.Identity())
        try:
            yield
        finally:
            setattr(self._parent, self._slot, nn.ModuleList(self._layers))
            for name, norm in self._norms.items():
                setattr(self._body, name, norm)


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer, for as long as its weights are in memory.

    Attributes:
        index: of the layer.
        attention: its attention module, float32.
        statistics: its moments over all windows.
    """

    index: int
    attention: nn.Module
    statistics: LayerStatistics


def calibrate_layers(
    stack: Stack,
    family: Family,
    hidden: HiddenStates,
    needs: frozenset[str],
    *,
    twice: Container[int] = (),
) -> Iterator[CalibratedLayer]:
    """Run a base layer by layer; yield each with its statistics while its weights are there.

    Args:
        stack: the base.
        family: its adapter.
        hidden: the embeddings of the calibration windows; they become the layers' outputs.
        needs: which moments.
        twice: layers that whoever takes them runs again, while it has them, to advance ``hidden``.

    Raises:
        ModelError: for a NaN or an infinity, with the name of the layer.
    """
    for index in range(len(stack)):
        with stack.layer(index):
            (attention,) = family.attention_modules(stack.model)
            sums = LayerSums(needs)
            with listening(stack.model, {attention: sums}):
                for _ in stack.run(hidden, advance=index not in twice):
                    require_finite(family, [sums], index)
            stack.forget_all_but(attention)
            yield CalibratedLayer(index, attention, sums.statistics())


def stored_shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Return names and shapes of the tensors that a checkpoint of a model holds, tied ones once."""
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    return {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
