"""Teach vLLM compressed models: ``pip install vdcompress`` beside vLLM is all that it takes.

vLLM calls :func:`register` through the entry point ``vllm.general_plugins`` in each of its
processes. Names are registered there, and who reads a config's sizes; the model class is imported
when an exported folder asks for it. With the plugin no remote code has to be trusted, K and V may
differ in width, layers may differ where K = V, and maps per head are cut between the ranks of
tensor parallelism.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

from vdcompress.registration import PREFIX, family_names

OLDEST, BEFORE = (0, 32), (0, 34)
MODEL_CLASS = "vdcompress.vllm_plugin.model:LatentForCausalLM"
MODELING = Path(__file__).parents[1] / "modeling"
CAUSAL = re.compile(r"^class (\w+ForCausalLM)\(", re.MULTILINE)
logger = logging.getLogger("vllm.vdcompress")


def register() -> None:
    """Name our model class to vLLM's registry; calling it again changes nothing."""
    import vllm
    from vllm import ModelRegistry

    if not is_supported(vllm.__version__):
        logger.warning(
            "vdcompress's plugin is for vLLM %s and stays out of %s: exported folders with "
            "K = V still run with --trust-remote-code",
            supported(),
            vllm.__version__,
        )
        return
    from vdcompress.vllm_plugin import shapes

    shapes.register([PREFIX + name for name in family_names()])
    registered = ModelRegistry.get_supported_archs()
    for architecture in architectures():
        if architecture not in registered:
            ModelRegistry.register_model(architecture, MODEL_CLASS)


def is_supported(version: str) -> bool:
    """Say whether the plugin knows a version of vLLM, such as ``0.32.0`` or ``0.33.1+cpu``."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and OLDEST <= (int(numbers[1]), int(numbers[2])) < BEFORE


def supported() -> str:
    """Return the versions of vLLM that the plugin knows, in words."""
    return f">={OLDEST[0]}.{OLDEST[1]},<{BEFORE[0]}.{BEFORE[1]}"


def architectures() -> list[str]:
    """Return the names of all families' causal language models, without importing one."""
    sources = (path.read_text(encoding="utf-8") for path in sorted(MODELING.glob("*.py")))
    return [name for source in sources for name in CAUSAL.findall(source)]
