"""The standard library's text and its roles, and the embedded checkpoint trained on it."""

from __future__ import annotations

import json
import math
import sysconfig
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vdcompress.data.stdlib import documents, role_of
from vdcompress.errors import DataError

DEMO = Path(str(files("vdcompress.demo_model")))
RESULTS = Path(__file__).parents[1] / "bench" / "results" / "demo-model-training.json"


@pytest.mark.parametrize(
    ("module", "role"),
    [
        ("json.decoder", "training"),
        ("argparse", "training"),
        ("pydoc_data.topics", "training"),
        ("random", "validation"),
        ("socket", "validation"),
        ("posixpath", "evaluation"),
        ("urllib.request", "evaluation"),
        ("ipaddress", "evaluation"),
    ],
)
def test_role_of_a_module_never_changes(module: str, role: str) -> None:
    assert role_of(module) == role


def test_module_split_off_another_keeps_its_role() -> None:
    assert role_of("_pydatetime") == role_of("datetime")
    assert role_of("pathlib._local") == role_of("pathlib")


def test_roles_are_disjoint_and_large_enough() -> None:
    # Very short modules may be alike by chance; longer ones must not.
    long = {
        role: {text for text in documents(role) if len(text) > 2000}
        for role in ("training", "validation", "evaluation")
    }
    assert not long["training"] & long["evaluation"]
    assert not long["training"] & long["validation"]
    assert not long["validation"] & long["evaluation"]
    characters = {role: sum(map(len, texts)) for role, texts in long.items()}
    assert characters["training"] > 4_000_000
    assert characters["validation"] > 100_000
    assert characters["evaluation"] > 400_000


def test_documents_come_in_the_same_order_each_time() -> None:
    assert list(documents("evaluation")) == list(documents("evaluation"))


def test_documentation_is_text_without_its_dictionary() -> None:
    topics = [text for text in documents("training") if "\nBoolean operations\n" in text]
    assert topics
    assert not any("topics = {" in text for text in topics)


def test_skips_tests_generated_modules_and_undecodable_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for index in range(100):
        (tmp_path / f"module{index}.py").write_text(f"x = {index}\n")
    (tmp_path / "module7.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "_sysconfigdata__linux.py").write_text("left_out = 1\n")
    for folder in ("test", "site-packages", "package/tests", "__pycache__", "encodings"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "module.py").write_text("left_out = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    texts = [t for role in ("training", "validation", "evaluation") for t in documents(role)]
    assert sorted(texts) == sorted(f"x = {index}\n" for index in range(100) if index != 7)


@pytest.mark.parametrize("folder", ["", "missing"])
def test_stripped_installation_is_one_clear_line(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / folder))
    with pytest.raises(DataError, match="no standard library sources") as caught:
        documents("training")
    assert "\n" not in caught.value.message + caught.value.hint
    assert caught.value.hint


def test_demo_model_is_small_and_of_the_promised_shape() -> None:
    assert sum(path.stat().st_size for path in DEMO.glob("*.*")) < 8_000_000
    config = json.loads((DEMO / "config.json").read_text())
    assert config["model_type"] == "gpt_neox"
    assert config["hidden_size"] // config["num_attention_heads"] == 64
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert config["hidden_dropout"] == config["attention_dropout"] == 0.0


def test_demo_tokenizer_keeps_every_character() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    text = "def f(x):\n\treturn x[0]  # é → 語\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (len(tokenizer), tokenizer.eos_token_id) == (4096, 0)


def test_demo_model_reaches_its_figure_on_the_evaluation_text() -> None:
    """Every 40th window; the bound leaves room for another Python version's text."""
    figure = json.loads(RESULTS.read_text())["heldout"]["evaluation"]["token_perplexity"]
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    ids = [i for text in documents("evaluation") for i in [*tokenizer(text).input_ids, 0]]
    windows = torch.tensor(ids[: len(ids) // 512 * 512]).view(-1, 512)[::40]
    with torch.inference_mode():
        loss = model(input_ids=windows, labels=windows).loss.item()
    assert math.exp(loss) < 1.4 * figure
