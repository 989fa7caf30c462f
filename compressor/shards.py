"""Checkpoints tensor by tensor: safetensors read and written in place, never mapped into memory.

A shard is 8 bytes (the header's length), a JSON header and the tensors' bytes one after another.
Reading goes through plain file reads: pages of a mapped file would count as memory of the process
for as long as the mapping lives, and only the tensor that is asked for is held here.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from vdcompress.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_HEADER_BYTES = 100_000_000
BLOCK_BYTES = 64_000_000
AGAIN = "download the checkpoint again, or make it again if it is a run"


@dataclass(frozen=True)
class Place:
    """Where one tensor lies.

    Attributes:
        file: its shard.
        offset: of its first byte in the file.
        dtype: as safetensors calls it, such as ``BF16``.
        shape: of the tensor.
    """

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder of safetensors, read one at a time in their stored dtype.

    Args:
        folder: holds ``model.safetensors``, or shards and their index.
        stored_as: other names that tensors have in older checkpoints, ``{name: older name}``.

    Raises:
        ModelError: for a missing, truncated or damaged file.
    """

    def __init__(self, folder: Path, stored_as: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._places: dict[str, Place] = {}
        for file in _files(folder):
            self._places |= _read_header(file)
        for name, older in (stored_as or {}).items():
            if name not in self._places and older in self._places:
                self._places[name] = self._places[older]

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors, older names included."""
        return frozenset(self._places)

    def require(self, shapes: Mapping[str, Iterable[int]]) -> None:
        """Raise :class:`ModelError` unless every named tensor is there in its shape."""
        missing = sorted(name for name in shapes if name not in self._places)
        if missing:
            raise ModelError(
                f"the weights in {self.folder} lack {len(missing)} tensors, "
                f"the first is {missing[0]}",
                AGAIN,
            )
        for name, shape in shapes.items():
            found = self._places[name].shape
            if found != tuple(shape):
                raise ModelError(
                    f"{name} in {self.folder} has shape {list(found)}, not {list(shape)}",
                    "the config and the weights are of different models",
                )

    def read(self, name: str) -> Tensor:
        """Return a tensor.

        Raises:
            ModelError: it is not there, cannot be read, or holds NaN or infinity.
        """
        place = self._place(name)
        with _reading(place.file) as stream:
            found = _read(stream, place, place.offset, place.shape)
        return self._finite(name, found)

    def rows(self, name: str, rows: Iterable[int]) -> Tensor:
        """Return some rows [n, ...] of a tensor, only they are read."""
        place = self._place(name)
        shape, size = place.shape[1:], _bytes(place.dtype, place.shape[1:])
        with _reading(place.file) as stream:
            found = [_read(stream, place, place.offset + row * size, shape) for row in rows]
        return self._finite(name, torch.stack(found))

    def itemsize(self, name: str) -> int:
        """Return the bytes of one of a tensor's numbers."""
        return _bytes(self._place(name).dtype, ())

    def blocks(self, name: str, size: int = BLOCK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """Yield a tensor in runs of whole rows, each of about ``size`` bytes, and their start."""
        place = self._place(name)
        if not place.shape:
            yield 0, self.read(name)
            return
        row = _bytes(place.dtype, place.shape[1:])
        step = max(1, size // max(row, 1))
        for start in range(0, place.shape[0], step):
            shape = (min(step, place.shape[0] - start), *place.shape[1:])
            with _reading(place.file) as stream:
                block = _read(stream, place, place.offset + start * row, shape)
            yield start, self._finite(name, block)

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise ModelError(f"the weights in {self.folder} lack {name}", AGAIN)
        return self._places[name]

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{name} in {self.folder} holds NaN or infinity", "the file is damaged"
            )
        return tensor


class ShardWriter:
    """Writes a checkpoint tensor by tensor, in any order, holding none of them.

    Which shard holds what follows from names and shapes alone, as ``save_torch_state_dict`` would
    decide it, so every file begins with its final header and has its final name; the files are
    byte for byte those that it would write. The folder is finished when :meth:`close` returns.

    Args:
        folder: where; it exists and holds no weights yet.
        tensors: names and shapes of all tensors, on any device (``meta`` too), in order.
        dtype: of all stored tensors.
        max_shard_size: such as ``5GB``.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        max_shard_size: str | int,
    ) -> None:
        self.folder, self.dtype = folder, dtype
        shaped = {
            name: torch.empty(tensor.shape, dtype=dtype, device="meta")
            for name, tensor in tensors.items()
        }
        split = split_torch_state_dict_into_shards(shaped, max_shard_size=max_shard_size)
        self._index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        self._sharded = split.is_sharded
        self._places: dict[str, Place] = {}
        self._left = {name: tensor.numel() for name, tensor in shaped.items()}
        self._streams: dict[Path, BinaryIO] = {}
        for file, names in split.filename_to_tensors.items():
            self._begin(folder / file, {name: shaped[name] for name in names})

    def _begin(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard's header, tensors in the order of safetensors: by name."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset, kind = 0, NAMES[self.dtype]
        for name in sorted(tensors):
            shape = tuple(tensors[name].shape)
            stop = offset + _bytes(kind, shape)
            entries[name] = {"dtype": kind, "shape": shape, "data_offsets": (offset, stop)}
            self._places[name] = Place(file, offset, kind, shape)
            offset = stop
        header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        header += b" " * (-len(header) % 8)
        stream = file.open("xb")
        self._streams[file] = stream
        stream.write(struct.pack("<Q", len(header)) + header)
        start = stream.tell()
        for name in tensors:
            place = self._places[name]
            self._places[name] = Place(file, start + place.offset, kind, place.shape)

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Write a tensor, or a run of its rows.

        Args:
            name: one of those announced.
            tensor: the whole tensor, or rows [n, ...]; any dtype and device.
            start: the first of these rows.

        Raises:
            ModelError: it is not finite in the stored dtype.
            ValueError: it is not what was announced.
        """
        place = self._places[name]
        stored = tensor.detach().to("cpu", self.dtype).contiguous()
        if stored.shape[1:] != place.shape[1:] or stored.numel() > self._left[name]:
            raise ValueError(f"{name}: {list(stored.shape)} is not of {list(place.shape)}")
        if not bool(torch.isfinite(stored).all()):
            kind = str(self.dtype).removeprefix("torch.")
            raise ModelError(f"{name} is not finite in {kind}", "use --dtype float32")
        stream = self._streams[place.file]
        stream.seek(place.offset + start * _bytes(place.dtype, place.shape[1:]))
        stream.write(stored.reshape(-1).view(torch.uint8).numpy().data)
        self._left[name] -= stored.numel()

    def copy(self, name: str, source: Checkpoint) -> None:
        """Write a tensor as another checkpoint has it, a block of rows at a time."""
        for start, block in source.blocks(name):
            self.write(name, block, start)

    def close(self) -> None:
        """Write the index and see that no tensor was forgotten.

        Raises:
            ValueError: one was.
        """
        self._close_streams()
        if forgotten := [name for name, left in self._left.items() if left]:
            raise ValueError(f"{len(forgotten)} tensors were not written, such as {forgotten[0]}")
        if self._sharded:
            (self.folder / INDEX).write_text(json.dumps(self._index, indent=2))

    def _close_streams(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close if all went well; else only let go of the files."""
        if kind is None:
            self.close()
        else:
            self._close_streams()


def _files(folder: Path) -> list[Path]:
    """Return the single file, or the shards that the index names."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise ModelError(f"no {SINGLE} and no {INDEX} in {folder}", AGAIN)
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index.name} in {folder} cannot be read", AGAIN) from error
    return [folder / shard for shard in shards]


def _read_header(file: Path) -> dict[str, Place]:
    """Return the places of a shard's tensors; each lies within the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(MOST_HEADER_BYTES, size - 8):
                raise _unreadable(file, "its header is longer than the file")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        found = {name: _place(file, 8 + length, entry) for name, entry in entries.items()}
    except FileNotFoundError as error:
        raise ModelError(f"{file.parent} lacks the shard {file.name}", AGAIN) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise _unreadable(file, "its header is damaged") from error
    for name, place in found.items():
        if place.dtype in DTYPES and place.offset + _bytes(place.dtype, place.shape) > size:
            raise _unreadable(file, f"it ends within {name}")
    return found


def _place(file: Path, start: int, entry: Mapping[str, object]) -> Place:
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        raise TypeError("not a tensor")
    begin, stop = (int(offset) for offset in offsets)
    kind, sizes = str(entry["dtype"]), tuple(int(size) for size in shape)
    if min(sizes, default=0) < 0 or begin < 0:
        raise ValueError("a negative size")
    if kind in DTYPES and stop - begin != _bytes(kind, sizes):
        raise ValueError("shape and bytes differ")
    return Place(file, start + begin, kind, sizes)


def _reading(file: Path) -> FileIO:
    try:
        return FileIO(file)
    except OSError as error:
        raise _unreadable(file, error.strerror or str(error)) from error


def _read(stream: FileIO, place: Place, offset: int, shape: tuple[int, ...]) -> Tensor:
    """Read ``shape`` numbers from ``offset`` on."""
    if place.dtype not in DTYPES:
        raise _unreadable(place.file, f"numbers of type {place.dtype} are not supported")
    buffer = torch.empty(_bytes(place.dtype, shape), dtype=torch.uint8)
    view = buffer.numpy().data
    stream.seek(offset)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise _unreadable(place.file, "it ends too early")
        done += count
    return buffer.view(DTYPES[place.dtype]).reshape(shape)


def _bytes(kind: str, shape: Iterable[int]) -> int:
    return math.prod(shape) * DTYPES[kind].itemsize


def _unreadable(file: Path, reason: str) -> ModelError:
    return ModelError(f"the weights in {file.parent} cannot be read: {file.name}: {reason}", AGAIN)
