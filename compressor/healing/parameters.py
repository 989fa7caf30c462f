"""Which parameters a finetune trains, and at which rate: groups by what they are for.

``latents`` are the projections that compression made, ``attention`` the rest of the attention
modules, ``embeddings`` the input and output embeddings, ``body`` everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from transformers import PreTrainedModel

from vdcompress.errors import UsageError
from vdcompress.healing.settings import HealSettings, Train
from vdcompress.modeling.latent_attention import LatentAttention

Group = Literal["latents", "attention", "body", "embeddings"]
GROUPS: tuple[Group, ...] = get_args(Group)
_LEARNS: dict[str, tuple[Group, ...]] = {
    "latents": GROUPS[:1],
    "attention": GROUPS[:2],
    "body": GROUPS[:3],
    "all": GROUPS,
}
_ATTENTION = (".attention.", ".self_attn.")


def groups_of(student: PreTrainedModel) -> dict[str, Group]:
    """Return the group of each parameter by its name; tied parameters stand there once."""
    made = _made_by_compression(student)
    embeddings = {
        id(parameter)
        for module in (student.get_input_embeddings(), student.get_output_embeddings())
        for parameter in ([] if module is None else module.parameters())
    }
    found: dict[str, Group] = {}
    for name, parameter in student.named_parameters():
        if id(parameter) in embeddings:
            found[name] = "embeddings"
        elif id(parameter) in made:
            found[name] = "latents"
        else:
            found[name] = "attention" if any(part in name for part in _ATTENTION) else "body"
    return found


def _made_by_compression(student: nn.Module) -> set[int]:
    return {
        id(parameter)
        for attention in student.modules()
        if isinstance(attention, LatentAttention)
        for name in attention.changed_projections()
        if (module := getattr(attention, name, None)) is not None
        for parameter in module.parameters()
    }


def trained_names(student: PreTrainedModel, train: Train) -> list[str]:
    """Return the names of the parameters that ``train`` selects, as in :class:`HealSettings`.

    Raises:
        UsageError: there are none.
    """
    learns = _LEARNS[train]
    names = [name for name, group in groups_of(student).items() if group in learns]
    if not names:
        raise UsageError(f"the model has no parameters to train as {train!r}", "train 'all'")
    return names


def optimizer_groups(student: PreTrainedModel, settings: HealSettings) -> list[dict[str, Any]]:
    """Return AdamW's groups of the parameters that require gradients, each with ``lr``.

    Matrices decay; norms and biases do not.
    """
    rates = {group: getattr(settings, f"{group}_rate") for group in GROUPS}
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    kinds = groups_of(student)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and not name.endswith("bias")
            decay = settings.weight_decay if decays else 0.0
            rate = settings.learning_rate * rates[kinds[name]]
            found.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in found.items()
    ]


def own_parameters(student: nn.Module, names: Sequence[str], teacher: nn.Module | None) -> None:
    """Give the student its own copy of each parameter to train that the teacher also uses.

    Parameters tied within the student stay tied.
    """
    shared = set() if teacher is None else {_storage(p) for p in teacher.parameters()}
    wanted = {id(student.get_parameter(name)) for name in names}
    copies: dict[int, nn.Parameter] = {}
    for module in student.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in wanted and _storage(parameter) in shared:
                if id(parameter) not in copies:
                    copy = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                    copies[id(parameter)] = copy
                setattr(module, name, copies[id(parameter)])


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
