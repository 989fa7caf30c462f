"""Tables and the model card come from a run's JSON alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from synthetic import model_gains
from vdcompress import report
from vdcompress.cache_size import CacheSize
from vdcompress.card import model_card
from vdcompress.cli.output import Flags
from vdcompress.cli.session import session
from vdcompress.cli.show import show_run
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.pipeline.document import kv_cache
from vdcompress.pipeline.planning import predicted
from vdcompress.plan import ModelShape, Plan, make_plan

SHAPE = ModelShape("gpt_neox", layers=2, hidden=64, heads=4, kv_heads=4, head_dim=16, rotary_dim=4)
MIXED = Plan(
    SHAPE,
    (
        LayerLayout(Part(1, 24), NopePart(2, 4), RotaryPart(2, 6, frequencies=(0, 0, 1))),
        SHAPE.full_layout(),
    ),
)


def test_the_card_shows_what_the_results_hold(tiny_run: Path) -> None:
    results = json.loads((tiny_run / "results.json").read_text())
    card = (tiny_run / "README.md").read_text()
    assert card == model_card(results)
    assert "25% smaller key/value cache" in card
    assert "| parameters | 100,864 | 92,608 | -8.19% |" in card
    assert "base_model" not in card  # a folder, not an id on the hub


def test_a_hub_model_is_named_as_the_base(tiny_run: Path) -> None:
    results = json.loads((tiny_run / "results.json").read_text())
    results["model"]["id"] = "EleutherAI/pythia-70m"
    card = model_card(results)
    assert "base_model: EleutherAI/pythia-70m" in card
    assert "# pythia-70m with a" in card


def test_healing_gets_a_column_of_its_own(tiny_run: Path) -> None:
    results = json.loads((tiny_run / "results.json").read_text())
    results["perplexity"] |= {"base": 10.0, "compressed": 12.0, "healed": 11.0}
    table = report.summary(results)
    assert table.header == ("", "base", "compressed", "healed", "change")
    row = next(row for row in table.rows if row[0] == "perplexity")
    assert row == ("perplexity", "10.00", "12.00", "11.00", "+10.0%")


def test_packed_bytes_say_of_how_many_tokens_they_are_a_share() -> None:
    def titles(plan: Plan) -> list[str]:
        cache = kv_cache(plan, CacheSize(4.0, 576, 2304, 4096, "bfloat16"))
        parameters = {"base": 2, "compressed": 1}
        document = {"parameters": parameters, "kv_cache": cache, "plan": plan.to_json()}
        return [row[0] for row in report.summary(document).rows]

    exact, packed = make_plan(SHAPE, v_dim=32), make_plan(SHAPE, v_dim=32, v_bits=4)
    alike = make_plan(SHAPE, v_dim=32, v_bits=8)  # nothing stays exact
    for plan in (exact, alike):
        assert titles(plan)[1:] == ["cache, bytes per token", "  measured after generate()"]
    assert titles(packed)[1:] == [
        "cache, bytes per token, of 2,048 tokens",
        "  measured after generate(), of 576 tokens",
    ]
    assert report.spent(packed.to_json()).title == "bytes per token that is packed"
    assert report.spent(exact.to_json()).title == "bytes per token"


def test_a_finetune_that_made_it_worse_says_so(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((tiny_run / "results.json").read_text())

    def said(healed: float) -> str:
        results["perplexity"] |= {"compressed": 12.0, "healed": healed}
        with session(Flags()) as out:
            show_run(out, results, "next: nothing")
        return " ".join(capsys.readouterr().err.split())

    assert "healing made it worse: 12.00 before it, 12.50 after it" in said(12.5)
    assert "worse" not in said(11.5) + said(12.0)


def test_equal_layers_share_a_row(tiny_run: Path) -> None:
    plan = json.loads((tiny_run / "results.json").read_text())["plan"]
    assert [row[0] for row in report.layers(plan).rows] == ["0-1"]
    plan["layers"][1]["v"]["width"] = 16
    assert [row[0] for row in report.layers(plan).rows] == ["0", "1"]


def test_markdown_aligns_words_left_and_figures_right() -> None:
    table = report.Table("", ("name", "value"), (("a", "1"),))
    assert table.markdown() == "| name | value |\n| :-- | --: |\n| a | 1 |"


def test_mixed_layers_show_their_parts() -> None:
    rows = report.layers(MIXED.to_json()).rows
    assert rows[0][:6] == ("0", "2 x 10", "6", "1 x 24", "20", "24")
    assert rows[1][:6] == ("1", "4 x 16", "4", "4 x 16", "64", "64")


def test_frequencies_are_counted_where_some_were_chosen() -> None:
    table = report.frequencies(MIXED.to_json())
    assert table is not None
    assert table.rows == (("0", "2", "0 x 2, 1 x 1"), ("1", "1", "0-1 x 1"))
    assert report.frequencies(make_plan(SHAPE, v_dim=32).to_json()) is None


def test_where_the_bytes_go_adds_up_to_the_plan() -> None:
    rows = report.spent(MIXED.to_json()).rows
    assert rows[0] == ("0", "48", "16", "24", "88")
    assert rows[-1] == ("all", "176", "112", "56", f"{MIXED.bytes_per_token:,}")


def test_predicted_loss_stands_beside_the_bytes() -> None:
    found = predicted(MIXED, model_gains(SHAPE))
    table = report.spent(MIXED.to_json(), found)
    assert table.header[-1] == "nats"
    assert table.rows[1][-4:] == ("0.0000",) * 4
    assert table.rows[0][-4:] == table.rows[-1][-4:]
    assert table.rows[-1][-1] == f"{found['total']:.4f}"


def test_only_a_bare_width_of_v_is_per_head() -> None:
    assert report.is_per_head(make_plan(SHAPE, v_dim=32).to_json())
    for other in (
        {"v_dim": 64},
        {"v_dim": 32, "k_dim": 32},
        {"v_dim": 32, "groups": 1},
        {"k_dim": 32},
    ):
        assert not report.is_per_head(make_plan(SHAPE, **other).to_json())
