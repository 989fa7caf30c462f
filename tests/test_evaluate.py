"""Evaluation, against a plain implementation and against figures known by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from vdcompress.errors import DataError, ModelError, UsageError
from vdcompress.evaluate import CHUNK, Bucket, count_windows, evaluate, evaluate_windows
from vdcompress.events import Event, Progress

VOCABULARY = 61


def random_model(seed: int) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
        hidden_dropout=0.5,
    )
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model() -> GPTNeoXForCausalLM:
    return random_model(1)


@pytest.fixture(scope="module")
def base() -> GPTNeoXForCausalLM:
    return random_model(2)


def random_tokens(count: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(3))


def plainly(model: Any, base: Any, tokens: Tensor, window: int, windows: int) -> dict[str, Any]:
    """Score one token at a time from the whole logits of each window."""
    ours, theirs, kl, places = [], [], [], []
    for number in range(windows):
        start = number * window
        inputs = tokens[start : start + window]
        inputs = inputs[: len(tokens) - 1 - start]
        if not len(inputs):
            break
        with torch.no_grad():
            p = base(inputs[None]).logits[0].log_softmax(-1)
            q = model(inputs[None]).logits[0].log_softmax(-1)
        for place in range(len(inputs)):
            target = tokens[start + place + 1]
            ours.append(-q[place, target].item())
            theirs.append(-p[place, target].item())
            kl.append((p[place].exp() * (p[place] - q[place])).sum().item())
            places.append(place)
    return {"ours": ours, "theirs": theirs, "kl": kl, "places": places}


def mean_exp(losses: list[float]) -> float:
    return math.exp(sum(losses) / len(losses))


def test_separate_windows_agree_with_scoring_one_token_at_a_time(model: Any) -> None:
    tokens = random_tokens(7 * 21).view(7, 21)
    losses = [
        [
            -model(row[None, :-1]).logits[0].log_softmax(-1)[place, row[place + 1]].item()
            for place in range(20)
        ]
        for row in tokens
    ]
    found = evaluate_windows(model, tokens, positions=(0, 4, 32), batch=3)
    assert found.perplexity == pytest.approx(mean_exp([one for row in losses for one in row]))
    assert (found.tokens, found.window) == (140, 20)
    assert [(bucket.start, bucket.stop) for bucket in found.positions] == [(0, 4), (4, 20)]
    first = mean_exp([one for row in losses for one in row[:4]])
    assert found.positions[0].compressed == pytest.approx(first)
    with pytest.raises(UsageError, match="not increasing edges"):
        evaluate_windows(model, tokens, positions=(4, 4))


@pytest.mark.parametrize(
    ("count", "window", "windows", "batch"),
    [(301, 100, 24, 1), (351, 100, 24, 2), (2000, 300, 3, 2), (650, 300, 24, 8), (901, 300, 2, 1)],
)
def test_agrees_with_a_plain_implementation(
    model: Any, base: Any, count: int, window: int, windows: int, batch: int
) -> None:
    tokens = random_tokens(count)
    expected = plainly(model, base, tokens, window, windows)

    found = evaluate(
        model,
        tokens,
        base=base,
        window=window,
        windows=windows,
        positions=(0, 16, 50, 100, 1000),
        batch=batch,
    )

    assert found.tokens == len(expected["ours"])
    assert found.perplexity == pytest.approx(mean_exp(expected["ours"]), rel=1e-10)
    assert found.base_perplexity == pytest.approx(mean_exp(expected["theirs"]), rel=1e-10)
    assert found.kl == pytest.approx(sum(expected["kl"]) / len(expected["kl"]), rel=1e-10)
    assert found.ratio == pytest.approx(found.perplexity / mean_exp(expected["theirs"]))
    for bucket in found.positions:
        within = [bucket.start <= place < bucket.stop for place in expected["places"]]
        ours = [loss for loss, inside in zip(expected["ours"], within, strict=True) if inside]
        theirs = [loss for loss, inside in zip(expected["theirs"], within, strict=True) if inside]
        assert bucket.compressed == pytest.approx(mean_exp(ours), rel=1e-10)
        assert bucket.base == pytest.approx(mean_exp(theirs), rel=1e-10)
    assert found.positions[-1].stop == window


def test_float32_agrees_with_float64(model: Any, base: Any) -> None:
    tokens = random_tokens(601)
    wide = evaluate(model, tokens, base=base, window=200)
    try:
        narrow = evaluate(model.float(), tokens, base=base.float(), window=200)
    finally:
        model.double(), base.double()

    assert narrow.perplexity == pytest.approx(wide.perplexity, rel=1e-4)
    assert narrow.kl == pytest.approx(wide.kl, rel=1e-3)


def test_a_model_beside_itself_has_no_distance(model: Any) -> None:
    found = evaluate(model, random_tokens(301), base=model, window=100)

    assert found.kl == pytest.approx(0, abs=1e-12)
    assert found.ratio == 1


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary(base: Any) -> None:
    ignorant = random_model(4)
    torch.nn.init.zeros_(ignorant.get_output_embeddings().weight)

    assert evaluate(ignorant, random_tokens(301), window=100).perplexity == pytest.approx(
        VOCABULARY
    )


def test_without_a_base_there_is_nothing_to_compare_with(model: Any) -> None:
    found = evaluate(model, random_tokens(301), window=100, positions=(0, 10))

    assert (found.base_perplexity, found.kl, found.ratio) == (None, None, None)
    assert found.positions[0].base is None
    json = found.to_json(data="words")
    assert json["perplexity"]["base"] is None
    assert json["perplexity"]["data"] == "words"


def test_json_has_the_fields_of_the_programs_document(model: Any, base: Any) -> None:
    found = evaluate(model, random_tokens(301), base=base, window=100, positions=(0, 16, 32))

    json = found.to_json()
    assert list(json["perplexity"]) == [
        "base", "compressed", "healed", "ratio", "kl", "tokens", "window", "data",
    ]  # fmt: skip
    assert json["perplexity"]["compressed"] == found.perplexity
    assert json["perplexity"]["healed"] is None
    assert [(b["from"], b["to"]) for b in json["positions"]] == [(0, 16), (16, 32)]
    assert set(json["positions"][0]) == {"from", "to", "base", "compressed"}
    assert found.to_json(healed=True)["perplexity"]["healed"] == found.perplexity


def test_logits_exist_for_one_chunk_at_a_time(model: Any) -> None:
    rows: list[int] = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, given, logits: rows.append(logits.shape[:-1].numel())
    )
    try:
        evaluate(model, random_tokens(1201), window=400, batch=3)
    finally:
        handle.remove()

    assert max(rows) == CHUNK
    assert sum(rows) == 1200


def test_dropout_is_off_and_the_mode_comes_back(model: Any, base: Any) -> None:
    tokens = random_tokens(301)
    expected = evaluate(model, tokens, base=base, window=100)
    model.train()
    try:
        found = evaluate(model, tokens, base=base, window=100)
        assert model.training
    finally:
        model.eval()

    assert not base.training
    assert found == expected


@pytest.mark.parametrize("count", [0, 1, 100])
def test_a_text_shorter_than_a_window_is_refused(model: Any, count: int) -> None:
    with pytest.raises(DataError, match="101 are needed"):
        evaluate(model, random_tokens(count), window=100)


@pytest.mark.parametrize("positions", [(), (5,), (0, 16, 16), (16, 0), (-1, 4)])
def test_edges_must_increase(model: Any, positions: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="increasing"):
        evaluate(model, random_tokens(301), window=100, positions=positions)


def test_edges_beyond_the_window_are_left_out(model: Any) -> None:
    found = evaluate(model, random_tokens(301), window=20, positions=(0, 16, 32, 64))

    assert [(b.start, b.stop) for b in found.positions] == [(0, 16), (16, 20)]
    assert all(isinstance(bucket, Bucket) for bucket in found.positions)


def test_a_loss_that_is_no_number_names_its_window(model: Any, base: Any) -> None:
    broken = random_model(5)
    with torch.no_grad():
        broken.get_input_embeddings().weight[7] = math.nan
    tokens = random_tokens(401).clamp(max=6)
    tokens[250] = 7

    with pytest.raises(ModelError, match="the model is NaN or infinite in window 3"):
        evaluate(broken, tokens, base=base, window=100, batch=2)
    with pytest.raises(ModelError, match="the base is NaN or infinite in window 3"):
        evaluate(model, tokens, base=broken, window=100)


def test_progress_counts_windows(model: Any) -> None:
    events: list[Event] = []
    evaluate(model, random_tokens(351), window=100, batch=2, on_event=events.append)

    assert [event.done for event in events if isinstance(event, Progress)] == [2, 3, 4]
    assert count_windows(351, window=100) == 4
    assert count_windows(351, window=100, windows=2) == 2
    assert count_windows(301, window=100) == 3
