"""Tables and the model card come from a run's JSON alone."""

from __future__ import annotations

import json
from pathlib import Path

from vdcompress import report


def test_the_card_shows_what_the_results_hold(tiny_run: Path) -> None:
    results = json.loads((tiny_run / "results.json").read_text())
    card = (tiny_run / "README.md").read_text()
    assert card == report.model_card(results)
    assert "25% smaller key/value cache" in card
    assert "| parameters | 100,864 | 92,608 | -8.19% |" in card
    assert "base_model" not in card  # a folder, not an id on the hub


def test_a_hub_model_is_named_as_the_base(tiny_run: Path) -> None:
    results = json.loads((tiny_run / "results.json").read_text())
    results["model"]["id"] = "EleutherAI/pythia-70m"
    card = report.model_card(results)
    assert "base_model: EleutherAI/pythia-70m" in card
    assert "# pythia-70m with a" in card


def test_healing_gets_a_column_of_its_own(tiny_run: Path) -> None:
    results = json.loads((tiny_run / "results.json").read_text())
    results["perplexity"] |= {"base": 10.0, "compressed": 12.0, "healed": 11.0}
    table = report.summary(results)
    assert table.header == ("", "base", "compressed", "healed", "change")
    row = next(row for row in table.rows if row[0] == "perplexity")
    assert row == ("perplexity", "10.00", "12.00", "11.00", "+10.0%")


def test_equal_layers_share_a_row(tiny_run: Path) -> None:
    plan = json.loads((tiny_run / "results.json").read_text())["plan"]
    assert [row[0] for row in report.layers(plan).rows] == ["0-1"]
    plan["layers"][1]["v"]["width"] = 16
    assert [row[0] for row in report.layers(plan).rows] == ["0", "1"]


def test_markdown_aligns_words_left_and_figures_right() -> None:
    table = report.Table("", ("name", "value"), (("a", "1"),))
    assert table.markdown() == "| name | value |\n| :-- | --: |\n| a | 1 |"
