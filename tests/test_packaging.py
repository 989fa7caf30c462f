"""The wheel holds one top-level name and everything below it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"vdcompress": "compressor", "vdcompress/cli": "cli", "vdcompress/recipes": "recipes"}
LARGEST = 8 * 2**20


def sources() -> dict[str, Path]:
    """Return every file that belongs into the wheel, by its name there."""
    wanted = {}
    for name, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                wanted[f"{name}/{path.relative_to(ROOT / folder)}"] = path
    return wanted


def test_every_package_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        str(Path(name).parent).replace("/", ".")
        for name in sources()
        if name.endswith("__init__.py")
    }
    assert set(settings["packages"]) == found
    with_code = {
        str(Path(name).parent).replace("/", ".") for name in sources() if name.endswith(".py")
    }
    assert with_code == found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("wheel")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", *FOLDERS.values()):
        if (ROOT / name).exists():
            subprocess.run(["cp", "-r", ROOT / name, copy], check=True)
    if not (copy / "README.md").exists():
        (copy / "README.md").write_text("")
    options = ["--no-deps", "--no-build-isolation", "-q", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", folder, copy], check=True)
    [found] = folder.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_has_one_top_level_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vdcompress"}
    assert len(tops) == 2


@pytest.mark.slow
def test_the_wheel_holds_everything(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    wanted = sources()
    assert {"vdcompress/py.typed", "vdcompress/demo_model/model.safetensors"} <= set(wanted)
    for name, path in wanted.items():
        assert archive.read(name) == path.read_bytes(), name
    assert wheel.stat().st_size < LARGEST


@pytest.mark.slow
def test_the_wheel_offers_the_program(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    [entry] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "vdcompress = vdcompress.cli.app:main" in archive.read(entry).decode()


@pytest.mark.slow
def test_an_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r})\n"
        "import vdcompress\nfrom vdcompress.recipe import load_recipe\n"
        "from vdcompress.load import load_config\n"
        "load_recipe('demo')\n"
        "print(vdcompress.__file__)\n"
        "print(load_config('demo').shape.head_dim)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert ended.stdout.split() == [str(target / "vdcompress" / "__init__.py"), "64"]
