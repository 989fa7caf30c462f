"""The JSON that every verb returns: one shape, made here."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from typing import TYPE_CHECKING, Any

from vdcompress.cost import base_cost, plan_cost
from vdcompress.errors import QualityGateError
from vdcompress.events import Event, OnEvent, StageEnded
from vdcompress.plan import Plan
from vdcompress.recipe import Recipe
from vdcompress.runs import command

if TYPE_CHECKING:
    from vdcompress.cache_size import CacheSize
    from vdcompress.families.base import Family
    from vdcompress.load import BaseConfig

SCHEMA = 1
V_PATH = ("v_compress", "o_contract")
K_PATH = ("q_proj", "k_proj", "q_expand", "k_compress")
NULL = (
    "run",
    "predicted_loss",
    "shared_latent",
    "perplexity",
    "positions",
    "gate",
    "seconds",
)
PACKAGES = ("vdcompress", "torch", "transformers")


class Timed:
    """A listener that passes events on and notes how long each stage took."""

    def __init__(self, on_event: OnEvent) -> None:
        self.seconds: dict[str, float] = {}
        self._on_event = on_event

    def __call__(self, event: Event) -> None:
        """Note a stage's end, and pass on."""
        if isinstance(event, StageEnded):
            self.seconds[event.stage] = round(event.seconds, 3)
        self._on_event(event)


def document(command: str, base: BaseConfig, plan: Plan, **found: Any) -> dict[str, Any]:
    """Return the fields that describe model and plan; those that do not apply are null.

    Args:
        command: the verb.
        base: the model before compression.
        plan: what the cache keeps.
        found: further fields, in place of the nulls.
    """
    return described(
        command,
        {"id": base.id, "revision": base.revision, "family": base.family.model_type},
        plan,
        parameters(base, plan),
        **found,
    )


def described(
    command: str, model: dict[str, Any], plan: Plan, counts: dict[str, int], **found: Any
) -> dict[str, Any]:
    """Return :func:`document` for a model that is described by what it is called and counts."""
    known = {
        "schema": SCHEMA,
        "command": command,
        "model": model,
        "plan": plan.to_json(),
        "parameters": counts,
        "kv_cache": kv_cache(plan),
        "cost": cost(plan),
    }
    return known | dict.fromkeys(NULL) | found


def parameters(base: BaseConfig, plan: Plan) -> dict[str, int]:
    """Count parameters from configs alone, shared ones once."""
    family = base.family
    compressed = family.compressed_on_meta(base.config, plan)
    return counted(family, family.base_on_meta(base.config), compressed)


def parameters_of_base(base: BaseConfig) -> dict[str, int | None]:
    """Count the base's parameters alone, where what it becomes is not known yet."""
    count = _count(base.family.base_on_meta(base.config), lambda _name: True)
    return {"base": count, "compressed": None, "v_path": None, "k_path": None}


def counted(family: Family, base: Any, compressed: Any) -> dict[str, int]:
    """Count the parameters of two models, and of the value and key paths of the second."""
    whole = _count(base, lambda _name: True)
    return {"base": whole, **compressed_parameters(family, compressed)}


def compressed_parameters(family: Family, compressed: Any) -> dict[str, int]:
    """Count the parameters of a compressed model, shared ones once, and those of both paths."""
    attentions = family.attention_modules(compressed)

    def path(*names: str) -> int:
        return sum(
            _count(module, lambda name: name.split(".")[0] in names) for module in attentions
        )

    return {
        "compressed": _count(compressed, lambda _name: True),
        "v_path": path(*V_PATH, family.output_name),
        "k_path": path(*K_PATH),
    }


def cost(plan: Plan) -> dict[str, dict[str, int]]:
    """Return weights and arithmetic of attention before and after."""
    return {"base": base_cost(plan.shape).to_json(), "compressed": plan_cost(plan).to_json()}


def kv_cache(plan: Plan, measured: CacheSize | None = None) -> dict[str, Any]:
    """Return the planned bytes per token, and those measured in ``generate()``'s cache."""
    base = plan.base_bytes_per_token
    found = {
        "base_bytes_per_token": base,
        "bytes_per_token": plan.bytes_per_token,
        "reduction": plan.reduction,
    }
    if measured is None:
        return found | {"measured": None}
    share = {"reduction": 1 - measured.bytes_per_token / base}
    return found | {"measured": asdict(measured) | share}


def environment(device: str, start_memory: int | None = None) -> dict[str, Any]:
    """Return what a figure may depend on beside the recipe.

    Args:
        device: where the models ran.
        start_memory: :func:`peak_memory` when the work began, imports done.
    """
    import torch

    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
        "device": device,
        "device_name": _device_name(device),
        "threads": torch.get_num_threads(),
        "start_memory_bytes": start_memory,
        "peak_memory_bytes": peak_memory(),
    }


def peak_memory() -> int | None:
    """Return the most memory that this process held at once, in bytes, where that is known."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def judged(recipe: Recipe, ratio: float | None) -> dict[str, Any] | None:
    """Return the quality gate's verdict, None where the recipe has no gate."""
    if recipe.gate is None or ratio is None:
        return None
    allowed = recipe.gate.max_ratio
    return {"max_ratio": allowed, "ratio": ratio, "passed": ratio <= allowed}


def require_gate(results: dict[str, Any]) -> None:
    """Raise :class:`QualityGateError` if a run's results say that it missed its gate."""
    gate, folder = results["gate"], results["run"]
    if gate and not gate["passed"]:
        raise QualityGateError(
            f"quality gate missed: perplexity is {gate['ratio']:.4f} times the base's, "
            f"the recipe allows {gate['max_ratio']:g}",
            f"the artefact is kept in {folder} and marked; heal it with: "
            + command("finetune", folder),
        )


def _count(model: Any, wanted: Callable[[str], bool]) -> int:
    return sum(value.numel() for name, value in model.named_parameters() if wanted(name))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str | None:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return platform.processor() or None
