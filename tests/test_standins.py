"""Real checkpoints: two windows against stored figures (``bench/two_windows.py``)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"
STORED = json.loads((BENCH / "results" / "two-windows.json").read_text())
ROUNDING, DRAWN = 0.002, 0.01


@pytest.fixture
def two_windows(monkeypatch: pytest.MonkeyPatch) -> Any:
    if "VDCOMPRESS_STANDINS" not in os.environ:
        pytest.skip("VDCOMPRESS_STANDINS is not set")
    assert (Path(os.environ["VDCOMPRESS_STANDINS"]) / "models").is_dir()
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])
    import two_windows

    return two_windows


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(STORED["models"]))
def test_figures_are_those_stored(two_windows: Any, name: str) -> None:
    stored, found = STORED["models"][name], two_windows.measured(name)
    assert found["parameters"] == stored["parameters"]
    for label in ("base", "svd", "optimal"):
        assert found[label] == pytest.approx(stored[label], rel=ROUNDING)
    assert found["base"] < found["optimal"] < found["svd"]
    assert found["shared"] == pytest.approx(stored["shared"], rel=DRAWN)  # labels are drawn


def test_stored_sizes_of_pythia() -> None:
    stored = STORED["models"]["pythia-70m-standin"]
    assert stored["v_dim"] == 320
    assert stored["parameters"] == 69_245_824


@pytest.mark.parametrize(
    ("name", "known"),
    [("pythia-70m-standin", (44.98, 11.74, 198.4)), ("llama-32m-standin", (49.40, 14.04, 242.5))],
)
def test_the_protocol_reproduces_the_known_figures(name: str, known: tuple[float, ...]) -> None:
    """24 windows of each text, as the benchmark measured them."""
    base = json.loads((BENCH / "results" / f"training-free-{name}.json").read_text())["base"]
    texts = ("books_dev", "docs_dev", "wikitext2_valid")
    assert [base[text]["perplexity"] for text in texts] == pytest.approx(known, rel=1e-3)
