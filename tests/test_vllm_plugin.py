"""vLLM's plugin where vLLM is not: what it knows without it, and what importing us costs."""

from __future__ import annotations

import logging
import subprocess
import sys
import tomllib
import types
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from vdcompress import families, vllm_plugin
from vdcompress.vllm_plugin.share import Share

ROOT = Path(__file__).parents[1]


class Registry:
    """vLLM's registry of models, as much of it as the plugin sees."""

    def __init__(self) -> None:
        self.models: dict[str, str] = {}
        self.model_types: set[str] = set()
        self.calls = 0

    def get_supported_archs(self) -> set[str]:
        return set(self.models)

    def register_model(self, architecture: str, model: str) -> None:
        self.calls += 1
        self.models[architecture] = model


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Registry:
    """Stand in for vLLM, of the version that the test names."""
    found = Registry()
    vllm = types.ModuleType("vllm")
    vllm.__version__ = getattr(request, "param", "0.32.0")  # type: ignore[attr-defined]
    vllm.ModelRegistry = found  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    shapes = types.ModuleType("shapes")
    shapes.register = found.model_types.update  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vdcompress.vllm_plugin.shapes", shapes)
    monkeypatch.setattr(vllm_plugin, "shapes", shapes, raising=False)
    return found


def test_vllm_finds_the_plugin() -> None:
    [found] = [e for e in entry_points(group="vllm.general_plugins") if e.name == "vdcompress"]
    assert found.load() is vllm_plugin.register


def test_every_family_is_registered_once(registry: Registry) -> None:
    vllm_plugin.register()
    vllm_plugin.register()
    known = families.available()
    names = {families.get(name).compressed_class().__name__ for name in known}
    assert names <= set(registry.models)
    types = {families.get(name).compressed_class().config_class.model_type for name in known}
    assert types == registry.model_types
    assert registry.calls == len(registry.models)
    module, name = vllm_plugin.MODEL_CLASS.split(":")
    source = ROOT / "compressor" / "/".join(module.split(".")[1:])
    assert f"class {name}(" in source.with_suffix(".py").read_text()


@pytest.mark.parametrize("registry", ["0.31.2", "0.34.0", "1.0", "dev"], indirect=True)
def test_another_version_is_left_alone_with_one_message(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        vllm_plugin.register()
    assert not registry.models
    assert not registry.model_types
    [record] = caplog.records
    assert ">=0.32,<0.34" in record.getMessage()
    assert "--trust-remote-code" in record.getMessage()


@pytest.mark.parametrize("registry", ["0.32.0", "0.33.1+cpu", "0.33.0.dev12"], indirect=True)
def test_versions_in_the_range_are_taken(registry: Registry) -> None:
    vllm_plugin.register()
    assert registry.models


def test_the_extra_names_the_same_range() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert settings["optional-dependencies"]["vllm"] == [f"vllm{vllm_plugin.supported()}"]


def test_neither_imports_the_other_and_the_plugin_is_cheap() -> None:
    code = (
        "import sys, vdcompress, vdcompress.vllm_plugin as plugin\n"
        "plugin.architectures()\n"
        "print([name for name in ('vllm', 'torch', 'transformers') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("whole", "ranks", "shares"),
    [
        (8, 1, [range(8)]),
        (8, 4, [range(2), range(2, 4), range(4, 6), range(6, 8)]),
        (2, 4, [range(1), range(1), range(1, 2), range(1, 2)]),
        (1, 2, [range(1), range(1)]),
    ],
)
def test_ranks_share_heads_and_latents(whole: int, ranks: int, shares: list[range]) -> None:
    loaded = torch.arange(whole * 3)[:, None]
    for rank, expected in enumerate(shares):
        share = Share.of(whole, rank, ranks)
        assert range(share.first, share.first + share.count) == expected
        rows = [row for part in expected for row in range(3 * part, 3 * part + 3)]
        assert share.rows(loaded)[:, 0].tolist() == rows


def test_heads_that_cannot_be_shared_are_refused() -> None:
    with pytest.raises(ValueError, match="6 latents or heads cannot be divided over 4 ranks"):
        Share.of(6, 0, 4)
