"""Load a base model: a folder, an alias or a hub id."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from vdcompress import families, hub
from vdcompress.errors import ModelError, did_you_mean
from vdcompress.families.base import Family
from vdcompress.plan import DTYPE_BYTES, ModelShape
from vdcompress.shards import AGAIN

DEMO = "demo"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class BaseConfig:
    """What is known of a base model before its weights are read.

    Attributes:
        id: what finds it again: a hub id, an absolute folder, or ``demo``.
        revision: commit of the hub, None for a folder.
        folder: where its files are.
        config: transformers' config.
        family: its adapter.
        shape: what a plan needs.
        dtype: of the stored weights, such as ``bfloat16``.
    """

    id: str
    revision: str | None
    folder: Path
    config: PreTrainedConfig
    family: Family
    shape: ModelShape
    dtype: str


@dataclass(frozen=True)
class Base(BaseConfig):
    """A loaded base: also the model (float32, in evaluation mode) and its tokenizer."""

    model: PreTrainedModel
    tokenizer: Any


def load_config(model: str | Path, *, revision: str | None = None) -> BaseConfig:
    """Read a base's config without its weights.

    Args:
        model: a folder, an alias such as ``pythia-70m`` or ``demo``, or a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: if it cannot be found, or no family handles it.
    """
    identity, folder, commit = _find(str(model), revision, ["config.json"])
    return _read_config(identity, folder, commit)


def fetch(model: str | Path, *, revision: str | None = None) -> BaseConfig:
    """Bring all files of a base into a folder and read its config; weights are not read.

    Args:
        model: a folder, an alias such as ``pythia-70m`` or ``demo``, or a hub id.
        revision: branch, tag or commit on the hub.

    Raises:
        ModelError: if it cannot be found, no family handles it, or a shard is missing.
    """
    wanted = ["config.json", "generation_config.json", *WEIGHT_FILES, *TOKENIZER_FILES]
    identity, folder, commit = _find(str(model), revision, wanted)
    base = _read_config(identity, folder, commit)
    require_weights(folder)
    return base


def load(model: str | Path, *, revision: str | None = None, device: str = "cpu") -> Base:
    """Load a base model in float32 with its tokenizer, and check that it is whole.

    Args:
        model: a folder, an alias such as ``pythia-70m`` or ``demo``, or a hub id.
        revision: branch, tag or commit on the hub.
        device: where to put it.

    Raises:
        ModelError: for missing, truncated or non-finite weights, a missing tokenizer, a family
            that is not known, or a checkpoint that is compressed already.
    """
    base = fetch(model, revision=revision)
    weights = read_weights(base.family.base_class(), base.folder)
    tokenizer = read_tokenizer(base.folder)
    return Base(**vars(base), model=moved(weights, device), tokenizer=tokenizer)


def read_weights(
    model_class: type[PreTrainedModel], folder: Path, *, surplus: bool = True
) -> PreTrainedModel:
    """Read a checkpoint strictly: every tensor present, of the right shape and finite; float32.

    Args:
        model_class: what to make of it.
        folder: where it is.
        surplus: allow tensors that the model does not have, as old checkpoints do.
    """
    read: Any = model_class.from_pretrained
    try:
        model, info = read(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(f"the weights in {folder} cannot be read: {reason}", AGAIN) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"the weights in {folder} lack {len(missing)} tensors, the first is {missing[0]}",
            AGAIN,
        )
    if not surplus and info["unexpected_keys"]:
        raise ModelError(
            f"the weights in {folder} hold {min(info['unexpected_keys'])}, which no layer reads",
            "the folder mixes files of different models",
        )
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{name} in {folder} holds NaN or infinity", "the file is damaged")
    return model.eval()


def load_tokenizer(model: str | Path) -> Any:
    """Load the tokenizer of a folder, an alias or a hub id; no config and no weights are needed.

    Raises:
        ModelError: if it cannot be found or read, or names no end-of-text token.
    """
    _, folder, _ = _find(str(model), None, list(TOKENIZER_FILES))
    return read_tokenizer(folder)


def read_tokenizer(folder: Path) -> Any:
    """Read a folder's tokenizer; it must name an end-of-text token."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(f"no tokenizer in {folder}", "copy the tokenizer's files into it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {folder} has no end-of-text token")
    return tokenizer


def moved(model: Any, device: str | torch.device) -> PreTrainedModel:
    """Put a model on a device; transformers' own ``to`` has no usable types."""
    return model.to(device)


def require_weights(folder: Path) -> None:
    """Raise :class:`ModelError` unless the folder has safetensors, all shards of them."""
    indexes = list(folder.glob("*.safetensors.index.json"))
    if not list(folder.glob("*.safetensors")):
        raise ModelError(f"no *.safetensors in {folder}", "vdcompress reads safetensors only")
    for index in indexes:
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index.name} in {folder} cannot be read") from error
        absent = sorted(name for name in shards if not (folder / name).is_file())
        if absent:
            raise ModelError(f"{folder} lacks the shard {absent[0]}", AGAIN)


def _read_config(identity: str, folder: Path, commit: str | None) -> BaseConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"no config.json in {folder}", "MODEL is a folder, an alias or a hub id")
    try:
        raw = json.loads(path.read_text())
        family = families.get(str(raw.get("model_type")))
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        shape = family.shape(config)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ModelError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return BaseConfig(identity, commit, folder, config, family, shape, _storage_dtype(config))


def _storage_dtype(config: PreTrainedConfig) -> str:
    name = str(config.dtype or "float32").removeprefix("torch.")
    return name if name in DTYPE_BYTES else "float32"


def _find(model: str, revision: str | None, patterns: list[str]) -> tuple[str, Path, str | None]:
    """Return id, folder and commit of what the user called MODEL."""
    if model == DEMO:
        return DEMO, Path(str(resources.files("vdcompress.demo_model"))), None
    if Path(model).is_dir():
        folder = Path(model).resolve()
        return str(folder), folder, None
    names = aliases()
    identity = names.get(model.lower(), model)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", identity):
        raise ModelError(
            f"no model folder {model}", "MODEL is a folder, an alias such as pythia-70m or a hub id"
        )
    hint = "" if "/" in identity else did_you_mean(model, names)
    folder, commit = hub.fetch(identity, revision, patterns, hint)
    return identity, folder, commit


def aliases() -> dict[str, str]:
    """Return every short name and the hub id behind it."""
    found: dict[str, str] = {}
    for name in families.available():
        found |= families.get(name).aliases
    return found
