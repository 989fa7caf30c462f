"""What importing the package does, and does not; each in a process of its own."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

LOAD = """
model = AutoModelForCausalLM.from_pretrained({folder!r}, local_files_only=True)
body = AutoModel.from_pretrained({folder!r}, local_files_only=True)
config = AutoConfig.from_pretrained({folder!r}, local_files_only=True)
print(type(model).__module__, type(body).__name__, type(config).__name__)
"""
ANSWER = "vdcompress.modeling.gpt_neox VDGPTNeoXModel VDGPTNeoXConfig"
AUTO = "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"


def fresh(code: str, cwd: Path) -> str:
    """Return what a new process prints last."""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip().splitlines()[-1]


def test_the_import_alone_is_light(tmp_path: Path) -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'datasets', 'sklearn'}"
    code = f"import sys, vdcompress; print(sorted({heavy} & set(sys.modules)))"
    assert fresh(code, tmp_path) == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import vdcompress\n" + AUTO,
        pytest.param(AUTO + "import vdcompress\n", marks=pytest.mark.slow),
        pytest.param("import transformers\nimport vdcompress\n" + AUTO, marks=pytest.mark.slow),
        pytest.param(
            "from transformers import GPTNeoXForCausalLM\nimport vdcompress\n" + AUTO,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import vdcompress\nfrom transformers import GPTNeoXForCausalLM\n" + AUTO,
            marks=pytest.mark.slow,
        ),
        pytest.param("from vdcompress import load\n" + AUTO, marks=pytest.mark.slow),
    ],
)
def test_auto_classes_know_the_models(imports: str, tiny_run: Path, tmp_path: Path) -> None:
    """Without ``trust_remote_code``, whatever is imported first."""
    assert fresh(imports + LOAD.format(folder=str(tiny_run)), tmp_path) == ANSWER


@pytest.mark.slow
def test_a_config_alone(tiny_run: Path, tmp_path: Path) -> None:
    code = (
        "import vdcompress\nfrom transformers import AutoConfig\n"
        f"print(type(AutoConfig.from_pretrained({str(tiny_run)!r})).__name__)"
    )
    assert fresh(code, tmp_path) == "VDGPTNeoXConfig"


def test_verbs_stay_verbs() -> None:
    """A verb and its room share a name; importing the room does not hide the verb."""
    import vdcompress

    for room in ("load", "calibrate", "rewrite", "heal", "evaluate", "export"):
        assert importlib.import_module(f"vdcompress.{room}") is sys.modules[f"vdcompress.{room}"]
        assert getattr(vdcompress, room).__name__ == room
        assert not isinstance(getattr(vdcompress, room), type(sys))
    assert all(callable(getattr(vdcompress, name)) for name in vdcompress.__all__)
    assert sorted(dir(vdcompress)) == sorted([*vdcompress.__all__, "__version__"])


def test_what_is_not_there_is_an_attribute_error() -> None:
    import vdcompress

    with pytest.raises(AttributeError, match="no attribute 'train'"):
        vdcompress.train  # noqa: B018


def test_the_folders_name_is_refused(tmp_path: Path) -> None:
    """``compressor`` is where the sources lie, not what the package is called."""
    import vdcompress

    sources = Path(vdcompress.__file__).parent
    (tmp_path / "compressor").symlink_to(sources)
    code = "try:\n    import compressor\nexcept ImportError as error:\n    print(error)"
    assert "this package is called vdcompress" in fresh(code, tmp_path)
