"""The tables of the original experiment, from rows whose figures are known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def row(recipe: str, seed: int, perplexity: float, **more: Any) -> dict[str, Any]:
    course = [
        {"epoch": 1, "train_ppl": 600.0, "val_ppl": perplexity},
        {"epoch": 2, "train_ppl": 150.0, "val_ppl": perplexity + 1},
    ]
    return {
        "recipe": recipe,
        "seed": seed,
        "reduction": 0.1875 if recipe == "seed-vdproj" else 0.0,
        "parameters": {"compressed": 1000, "v_path": 100},
        "epochs": course,
        "best_epoch": 1,
        "first_phase": None,
        "perplexity": perplexity,
        "positions": [{"from": 0, "to": 16, "perplexity": perplexity + 100}],
    } | more


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCH)
    import seed_tables

    rows = [
        row("seed-vdproj", 0, 102.0),
        row("seed-vdproj", 1, 206.0),
        row("seed-restore-e2e", 1, 200.0),
        row("seed-restore-e2e", 0, 100.0),
        row("seed-restore-2phase", 0, 204.0, first_phase={"epochs": row("", 0, 9000.0)["epochs"]}),
    ]
    monkeypatch.setattr(seed_tables, "results", lambda _name: {"rows": rows})
    yield seed_tables
    del sys.modules["seed_tables"]


def test_models_of_one_seed_are_compared(tables: Any) -> None:
    found = {cells[0]: cells[1:] for cells in tables.experiment().rows}
    assert list(found) == ["restored, end to end", "restored, two phases", "**compressed as is**"]
    assert found["**compressed as is**"] == (
        *("18.75%", "1,000", "100", "2", "1"),
        *("600.0 (600.0 to 600.0)", "154.0 (102.0 to 206.0)"),
        *("+2.5% (+2.0% to +3.0%)", "-50.0%"),
    )
    assert found["restored, end to end"][-2:] == ("", "-51.0%")


def test_every_phase_has_its_course(tables: Any) -> None:
    rows = tables.epochs().rows
    assert ("restored, two phases: the first", "600.0 / 9000.0", "150.0 / 9001.0") in rows
    assert ("**compressed as is**", "600.0 / 102.0", "150.0 / 103.0") in rows


def test_positions_are_compared_too(tables: Any) -> None:
    rows = dict(tables.positions().rows)
    assert tables.positions().header == ("tokens", "0-16")
    assert rows["**compressed as is**"] == "254.0 (202.0 to 306.0)"
    assert rows["compressed as is to restored, end to end"] == "+1.5% (+1.0% to +2.0%)"
