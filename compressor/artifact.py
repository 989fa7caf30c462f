"""The artefact folder: written atomically, read strictly (DESIGN 4)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from vdcompress import families
from vdcompress.errors import ArtifactError, ModelError, RunError
from vdcompress.load import (
    TOKENIZER_FILES,
    Base,
    moved,
    read_tokenizer,
    read_weights,
    require_weights,
)
from vdcompress.plan import Plan

FORMAT = 1
MARKER = "vdcompress.json"
COMPARISON = "comparison"
MARKED = ("base", "calibration", "dtype", "plan")
MAX_SHARD_SIZE = "5GB"
COPIED_FILES = (*TOKENIZER_FILES, "generation_config.json")


@dataclass(frozen=True)
class Compressed:
    """A compressed model and where it comes from.

    Attributes:
        model: float32, in evaluation mode.
        tokenizer: the base's.
        plan: the decision that made it.
        base_id: what finds the base again: a hub id, a folder or ``demo``.
        base_revision: commit of the hub, None for a folder.
        source_folder: where the tokenizer's files are, to be copied byte for byte.
        dtype: of the stored weights.
        calibration: digest of the calibration text, empty where it is not known.
    """

    model: PreTrainedModel
    tokenizer: Any
    plan: Plan
    base_id: str
    base_revision: str | None
    source_folder: Path
    dtype: str
    calibration: str = ""

    @classmethod
    def of(
        cls, base: Base, plan: Plan, model: PreTrainedModel, *, calibration: str = ""
    ) -> Compressed:
        """Return what ``rewrite`` made of a base, ready to be saved.

        Args:
            base: the model before compression.
            plan: the decision that was carried out.
            model: what ``rewrite`` returned, healed or not.
            calibration: digest of the calibration text, where it is known.
        """
        return cls(
            model=model,
            tokenizer=base.tokenizer,
            plan=plan,
            base_id=base.id,
            base_revision=base.revision,
            source_folder=base.folder,
            dtype=base.dtype,
            calibration=calibration,
        )


def write_artifact(
    folder: Path,
    compressed: Compressed,
    *,
    results: Mapping[str, Any] | None = None,
    recipe: str = "",
    card: str = "",
    attached: Mapping[str, bytes | Path] | None = None,
    force: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write an artefact folder: all of it, or nothing.

    Args:
        folder: where; it must not exist, be empty, or hold an artefact that ``force`` replaces.
        compressed: what to write.
        results: for ``results.json``; this file and the next two are left out if not given.
        recipe: the merged recipe's text, for ``recipe.yaml``.
        card: the model card, for ``README.md``.
        attached: further files by name: what they hold, or a folder to copy.
        force: replace an older artefact.
        check: called with the finished folder before it gets its name; raises to refuse it.

    Raises:
        RunError: if the folder is taken.
        ArtifactError: if the disk is full or cannot be written.
    """
    with new_folder(folder, force=force) as partial:
        _write_model(partial, compressed)
        _attach(partial, attached or {})
        write_companions(partial, compressed, results=results, recipe=recipe, card=card)
        if check is not None:
            check(partial)
    return folder


@contextmanager
def new_folder(folder: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``folder`` when the block ends well, else it is removed.

    Raises:
        RunError: if the folder is taken.
        ArtifactError: if the disk is full or cannot be written.
    """
    require_free(folder, force=force)
    with _atomic(folder) as partial:
        yield partial


def write_companions(
    folder: Path,
    compressed: Compressed,
    *,
    results: Mapping[str, Any] | None = None,
    recipe: str = "",
    card: str = "",
) -> None:
    """Write all that belongs to an artefact beside config and weights, the marker last.

    Args:
        folder: has config and weights already.
        compressed: its model's tensors are not read.
        results: for ``results.json``; this file and the next two are left out if not given.
        recipe: the merged recipe's text, for ``recipe.yaml``.
        card: the model card, for ``README.md``.
    """
    _copy_code(folder, compressed)
    for name in COPIED_FILES:
        if (compressed.source_folder / name).is_file():
            shutil.copyfile(compressed.source_folder / name, folder / name)
    figures = "" if results is None else json.dumps(results, indent=2) + "\n"
    texts = {"recipe.yaml": recipe, "results.json": figures, "README.md": card}
    for name, text in texts.items():
        if text:
            (folder / name).write_text(text)
    (folder / MARKER).write_text(json.dumps(_marker(compressed), indent=2) + "\n")


def load_artifact(folder: Path, *, device: str = "cpu") -> Compressed:
    """Load an artefact folder strictly, in float32.

    Raises:
        RunError: if there is none, it is unfinished, or a newer vdcompress wrote it.
        ModelError: if its weights are damaged.
    """
    marker = read_marker(folder)
    plan = Plan.from_json(marker["plan"])
    require_weights(folder)
    model_class = families.get(plan.shape.family).compressed_class()
    return Compressed(
        model=moved(read_weights(model_class, folder, surplus=False), device),
        tokenizer=read_tokenizer(folder),
        plan=plan,
        base_id=marker["base"]["id"],
        base_revision=marker["base"]["revision"],
        source_folder=folder,
        dtype=marker["dtype"],
        calibration=marker["calibration"],
    )


def read_marker(folder: Path) -> dict[str, Any]:
    """Read ``vdcompress.json``, what makes a folder an artefact.

    Raises:
        RunError: if it is missing, unreadable or of a future format, or says that the folder
            holds no compressed model but one from scratch.
    """
    if not folder.is_dir():
        raise RunError(f"no run {folder}", "vdcompress apply MODEL --v-dim N makes one")
    try:
        marker: dict[str, Any] = json.loads((folder / MARKER).read_text())
        if marker["format"] > FORMAT:
            raise RunError(
                f"{folder} has format {marker['format']}, this vdcompress reads {FORMAT}",
                "install a newer vdcompress",
            )
    except FileNotFoundError as error:
        raise RunError(
            f"{folder} is not a finished run: it has no {MARKER}", "run the command again"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / MARKER} cannot be read") from error
    if marker.get(COMPARISON):
        raise RunError(
            f"{folder} was trained from scratch, to be compared with: there is no base behind it",
            f"its figures are in {folder / 'results.json'}",
        )
    if absent := [key for key in MARKED if key not in marker]:
        raise RunError(f"{folder / MARKER} cannot be read: it lacks {absent[0]!r}")
    return marker


def require_free(folder: Path, *, force: bool) -> None:
    """Raise :class:`RunError` unless an artefact may be written to ``folder``."""
    if folder.is_file():
        raise RunError(f"{folder} is a file", "name another folder with -o")
    ancestor = next(parent for parent in folder.absolute().parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise RunError(f"{folder} cannot be made in {ancestor}", "name another folder with -o")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / MARKER).is_file():
        raise RunError(
            f"{folder} is not empty, and not an artefact of vdcompress", "name another with -o"
        )
    if not force:
        raise RunError(f"{folder} holds an artefact already", "--force replaces it")


@contextmanager
def _atomic(folder: Path) -> Iterator[Path]:
    """Yield a folder beside ``folder`` that takes its name when the block ends well."""
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        yield partial
        _replace(folder, partial)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{folder} could not be written: {getattr(error, 'strerror', None) or error}",
            "nothing was left behind; check the folder and the space on its disk",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(folder: Path, partial: Path) -> None:
    """Rename ``partial`` to ``folder``; an older folder goes only when the new one stands."""
    old = folder.parent / f".{folder.name}.old-{os.getpid()}"
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_model(folder: Path, compressed: Compressed) -> None:
    """Write weights in the storage dtype, and the config."""
    model, storage = compressed.model, getattr(torch, compressed.dtype)
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    state = {
        name: tensor.detach().to("cpu", storage).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ModelError(f"{broken[0]} is not finite in {compressed.dtype}", "use --dtype float32")
    write_config(folder, compressed)
    write_weights(folder, state, like=folder / "config.json")


def write_weights(folder: Path, state: dict[str, torch.Tensor], *, like: Path) -> None:
    """Write tensors that lie on the CPU, for the same readers as the file ``like``."""
    save_torch_state_dict(state, folder, max_shard_size=MAX_SHARD_SIZE)
    mode = like.stat().st_mode  # safetensors' own is for the owner alone
    for shard in folder.glob("*.safetensors"):
        shard.chmod(mode)


def write_config(folder: Path, compressed: Compressed) -> None:
    """Write ``config.json`` with its ``auto_map``; the model's tensors are not read."""
    model, storage = compressed.model, getattr(torch, compressed.dtype)
    config = model.config.__class__.from_dict(model.config.to_dict())
    family = families.get(compressed.plan.shape.family)
    module = family.model_type
    config.dtype = storage
    config.architectures = [family.compressed_class().__name__]
    config.auto_map = {
        "AutoConfig": f"{module}.{type(config).__name__}",
        "AutoModel": f"{module}.{family.compressed_body().__name__}",
        "AutoModelForCausalLM": f"{module}.{family.compressed_class().__name__}",
    }
    config.save_pretrained(folder)


def _attach(folder: Path, attached: Mapping[str, bytes | Path]) -> None:
    for name, found in attached.items():
        if isinstance(found, bytes):
            (folder / name).write_bytes(found)
        else:
            shutil.copytree(found, folder / name, ignore_dangling_symlinks=True)


def _copy_code(folder: Path, compressed: Compressed) -> None:
    """Copy the family's modelling file and the siblings that it imports."""
    code = Path(__file__).parent / "modeling" / f"{compressed.plan.shape.family}.py"
    for source in [code, *map(Path, get_relative_import_files(code))]:
        shutil.copyfile(source, folder / source.name)


def _marker(compressed: Compressed) -> dict[str, Any]:
    from vdcompress import __version__

    return {
        "format": FORMAT,
        "vdcompress": __version__,
        "base": {"id": compressed.base_id, "revision": compressed.base_revision},
        "dtype": compressed.dtype,
        "calibration": compressed.calibration,
        "plan": compressed.plan.to_json(),
    }
