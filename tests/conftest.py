"""What tests share: tiny random models on disk, a text, and the program run in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only wait for each other
torch.set_num_threads(1)  # here too, where torch has read that variable before it was set
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on CPU; read when Triton is imported
END = "<|endoftext|>"
SENTENCE = "the cache of a model grows with every token and so its values are kept narrow"


@dataclass(frozen=True)
class Ended:
    """How the program ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one document on stdout."""
        return json.loads(self.out)


Vdcompress = Callable[..., Ended]


def pytest_collection_finish() -> None:
    """Let searches for garbage, of which each finetune makes some, pass over what was imported."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Take back the threads that torch has once numba starts its own: one for each processor."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def vdcompress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Vdcompress:
    """Run the program in this process, in a folder of its own."""
    from vdcompress.cli.app import run

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str | Path) -> Ended:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run([str(argument) for argument in arguments])
        return Ended(code, out.getvalue(), err.getvalue())

    return call


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Return a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([END, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@pytest.fixture(scope="session")
def tiny_neox(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Return the folder of a random GPT-NeoX: 2 layers, 4 heads of 16, partial rotary."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=264,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=256,
        rotary_pct=0.25,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(GPTNeoXForCausalLM, config, tiny_tokenizer, tmp_path_factory.mktemp("neox"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """Return the folder of a random Llama: 2 layers, 4 query and 2 key/value heads of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=264,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(LlamaForCausalLM, config, tiny_tokenizer, tmp_path_factory.mktemp("llama"))


def _families() -> tuple[str, ...]:
    from vdcompress import families

    return families.available()


@pytest.fixture(scope="session", params=_families())
def base(request: Any, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Any:
    """Return a loaded float32 base of every family; all weights and biases are random."""
    import torch

    from vdcompress import families
    from vdcompress.load import load

    model_class = families.get(request.param).base_class()
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = model_class(model_class.config_class(**_tiny_config(model_class)))
        for name, parameter in model.named_parameters():
            scale = parameter.dim() == 1 and name.endswith("weight")  # of a norm
            torch.nn.init.normal_(parameter, mean=float(scale), std=0.15)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return load(folder)


def _tiny_config(model_class: Any) -> dict[str, Any]:
    """2 layers, 4 heads of 16, 2 key/value heads where a family knows of them."""
    known = {field.name for field in dataclasses.fields(model_class.config_class)}
    wanted = {
        "vocab_size": 264,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return {name: value for name, value in wanted.items() if name in known}


@pytest.fixture(scope="session")
def token_windows() -> Any:
    """Return token ids [16, 64]."""
    import torch

    return torch.randint(1, 264, (16, 64), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="session")
def statistics(base: Any, token_windows: Any) -> Any:
    """Return all that calibration can measure of ``base`` on ``token_windows``."""
    from vdcompress.calibrate import EVERYTHING, calibrate

    return calibrate(base, token_windows, needs=EVERYTHING, batch=4)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a text of about 200,000 characters."""
    draw = random.Random(0)
    lines = (
        " ".join(draw.choices(SENTENCE.split(), k=draw.randint(4, 16))) + ".\n" for _ in range(4000)
    )
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_neox: Path, text_file: Path) -> Path:
    """Return a finished run of the tiny GPT-NeoX; tests leave it as it is."""
    from vdcompress.pipeline.apply import apply_recipe
    from vdcompress.recipe import Recipe

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    apply_recipe(Recipe().merged(tiny_settings(tiny_neox, text_file)), output=folder)
    return folder


def tiny_settings(model: Path, text: Path) -> dict[str, Any]:
    """Return settings that take a second."""
    return {
        "model": str(model),
        "plan.v_dim": 32,
        "calibration.data": str(text),
        "calibration.samples": 8,
        "calibration.seq_len": 64,
        "evaluation.windows": 2,
        "evaluation.seq_len": 128,
        "heal.samples": 16,
        "heal.validation_samples": 8,
        "heal.seq_len": 32,
        "heal.epochs": 2,
    }


def _save(model_class: Any, config: Any, tokenizer: Any, folder: Path) -> Path:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
