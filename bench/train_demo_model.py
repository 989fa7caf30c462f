"""Train the embedded demo checkpoint: tokenizer, model, log and figures.

Three steps, so that the text is prepared where the package is and trained where the GPU is (the
training steps need torch and transformers only)::

    python bench/train_demo_model.py prepare --out DATA
    python bench/train_demo_model.py sweep --data DATA --out FIRST --trials first
    python bench/train_demo_model.py sweep --data DATA --out SECOND --trials second \\
        --earlier FIRST/results.json

``prepare`` trains the byte-level BPE tokenizer on the training role of
:mod:`vdcompress.data.stdlib` and writes each role's tokens. ``train`` trains one configuration
and keeps the weights of the lowest validation loss, rounded to bfloat16. ``sweep`` trains every
configuration of one of ``SWEEPS`` side by side, keeps the one of the lowest validation loss, and
only then, once, measures it on the evaluation role; it writes ``OUT/model`` and
``OUT/results.json``. The figures kept in ``bench/results/demo-model-training.json`` come from the
two lines above with ``--time-limit 215`` and ``115``, seconds that bound every schedule there.

Losses are means over predicted tokens in nats, over consecutive windows of 512 tokens without
overlap (511 predictions each); a rest shorter than a window is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

END_OF_TEXT = "<|endoftext|>"
ROLES = ("training", "validation", "evaluation")
SEQUENCE_LENGTH = 512
MODEL_SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "intermediate_size": 768,
    "max_position_embeddings": SEQUENCE_LENGTH,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
    "tie_word_embeddings": True,
    "use_parallel_residual": True,
    "attention_bias": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training configuration.

    Args:
        learning_rate: peak of the cosine schedule, reached after ``warmup`` of the steps.
        dropout: of embeddings, attention weights and both residual branches.
        weight_decay: of AdamW, for matrices other than the embedding.
        epochs: passes over the training tokens that the schedule is laid out for.
        batch: windows a step.
        evaluate_every: steps from one evaluation to the next.
        patience: evaluations without a lower validation loss after which training stops.
        time_limit: seconds by which the schedule has ended at the latest.
    """

    learning_rate: float = 3e-3
    dropout: float = 0.1
    weight_decay: float = 0.1
    epochs: float = 30.0
    batch: int = 32
    warmup: float = 0.03
    final_fraction: float = 0.01
    beta2: float = 0.98
    clip: float = 1.0
    evaluate_every: int = 100
    patience: int = 25
    time_limit: float = math.inf
    seed: int = 0


SWEEPS: dict[str, dict[str, Trial]] = {
    "first": {
        "base": Trial(),
        "lower-rate": Trial(learning_rate=1.5e-3),
        "higher-rate": Trial(learning_rate=6e-3),
        "more-dropout": Trial(dropout=0.2),
        "more-decay": Trial(weight_decay=0.5),
        "longer": Trial(weight_decay=0.5, epochs=60.0),
        "longer-more-dropout": Trial(dropout=0.2, weight_decay=0.5, epochs=60.0),
    },
    "second": {
        "dropout-0.2-decay-1": Trial(dropout=0.2, weight_decay=1.0, epochs=55.0),
        "dropout-0.2-decay-0.5": Trial(dropout=0.2, weight_decay=0.5, epochs=55.0),
    },
}


# ------------------------------------------------------------------------------ preparing


def prepare(out: Path, vocabulary: int, limit: int | None) -> None:
    """Train the tokenizer and write ``tokenizer/``, ``<role>.npy`` and ``data.json`` to ``out``."""
    from vdcompress.data.stdlib import documents

    out.mkdir(parents=True, exist_ok=True)
    texts = {role: list(documents(role))[:limit] for role in ROLES}
    tokenizer = train_tokenizer(texts["training"], vocabulary)
    save_tokenizer(tokenizer, out / "tokenizer")
    facts: dict[str, Any] = {"python": platform.python_version(), "vocabulary": vocabulary}
    for role, role_texts in texts.items():
        tokens = encode(tokenizer, role_texts)
        np.save(out / f"{role}.npy", tokens)
        facts[role] = {
            "documents": len(role_texts),
            "bytes": sum(len(text.encode()) for text in role_texts),
            "tokens": int(tokens.size),
        }
    write_json(out / "data.json", facts)
    print(json.dumps(facts))


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """Return a byte-level BPE of ``vocabulary`` entries; end-of-text is id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer as ``AutoTokenizer`` reads it."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
    ).save_pretrained(folder)


def encode(tokenizer: Any, texts: list[str]) -> np.ndarray:
    """Return the texts' ids as one uint16 stream, each text closed by end-of-text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids += [*encoding.ids, end]
    return np.array(ids, dtype=np.uint16)


# ------------------------------------------------------------------------------- training


def train(data: Path, out: Path, trial: Trial, shape: dict[str, Any], device: str) -> None:
    """Train one configuration; write the best weights (``model/``) and ``results.json``."""
    import torch

    torch.manual_seed(trial.seed)
    torch.set_float32_matmul_precision("high")
    facts = json.loads((data / "data.json").read_text())
    streams = {role: load_tokens(data / f"{role}.npy", device) for role in ROLES[:2]}
    model = build_model(facts["vocabulary"], shape, trial.dropout).to(device)
    curve, best, seconds, reason = fit(model, streams, trial)
    model.load_state_dict(best["weights"])
    save_checkpoint(model, data / "tokenizer", out / "model")
    result = {
        "trial": dataclasses.asdict(trial) | {"time_limit": finite(trial.time_limit)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "best_step": best["step"],
        "best_epoch": best["step"] * trial.batch * SEQUENCE_LENGTH / len(streams["training"]),
        "train_loss_at_best": best["train_loss"],
        "validation_loss": best["validation_loss"],
        "steps": curve[-1]["step"],
        "tokens_seen": curve[-1]["step"] * trial.batch * SEQUENCE_LENGTH,
        "stopped": reason,
        "seconds": round(seconds, 1),
        "curve": curve,
    }
    write_json(out / "results.json", result)


def build_model(vocabulary: int, shape: dict[str, Any], dropout: float) -> Any:
    """Return a freshly initialised GPT-NeoX in float32."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=vocabulary, hidden_dropout=dropout, attention_dropout=dropout, **shape
    )
    return GPTNeoXForCausalLM(config)


def fit(
    model: Any, streams: dict[str, Any], trial: Trial
) -> tuple[list[dict[str, float]], dict[str, Any], float, str]:
    """Train until the schedule ends or the validation loss has stopped falling.

    Returns:
        The curve (one entry an evaluation), the best evaluation with its weights, the seconds
        taken, and why training stopped.
    """
    import torch

    optimizer = make_optimizer(model, trial)
    per_epoch = (len(streams["training"]) - SEQUENCE_LENGTH) // (SEQUENCE_LENGTH * trial.batch)
    total = max(1, round(trial.epochs * per_epoch))
    batches = training_batches(streams["training"], trial)
    curve: list[dict[str, float]] = []
    best: dict[str, Any] = {"validation_loss": math.inf, "step": 0}
    running: list[Any] = []
    started = time.perf_counter()
    progress, step = 0.0, 0
    while progress < 1.0:
        set_rate(optimizer, trial, progress)
        running.append(training_step(model, next(batches), optimizer, trial.clip))
        step += 1
        progress = max(step / total, (time.perf_counter() - started) / trial.time_limit)
        if step % trial.evaluate_every and progress < 1.0:
            continue
        point = {
            "step": step,
            "seconds": round(time.perf_counter() - started, 1),
            "train_loss": torch.stack(running).mean().item(),
            "validation_loss": heldout_loss(model, streams["validation"]),
        }
        running = []
        curve.append(point)
        print(json.dumps(point), flush=True)
        if point["validation_loss"] < best["validation_loss"]:
            best = {**point, "weights": {k: v.clone() for k, v in model.state_dict().items()}}
        if step - best["step"] >= trial.patience * trial.evaluate_every:
            return curve, best, time.perf_counter() - started, "validation loss stopped falling"
    reason = "end of schedule" if step == total else "end of schedule, shortened by the time limit"
    return curve, best, time.perf_counter() - started, reason


def make_optimizer(model: Any, trial: Trial) -> Any:
    """Return AdamW that decays matrices only: no embedding, norm or bias."""
    import torch

    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() != 2 or "embed" in name]
    groups = [
        {"params": decayed, "weight_decay": trial.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = others[0].is_cuda
    return torch.optim.AdamW(groups, trial.learning_rate, betas=(0.9, trial.beta2), fused=fused)


def set_rate(optimizer: Any, trial: Trial, progress: float) -> None:
    """Set the learning rate at ``progress`` in [0, 1): linear warm-up, then a cosine."""
    if progress < trial.warmup:
        share = (progress + 0.001) / (trial.warmup + 0.001)
    else:
        cosine = 0.5 * (1.0 + math.cos(math.pi * (progress - trial.warmup) / (1.0 - trial.warmup)))
        share = trial.final_fraction + (1.0 - trial.final_fraction) * cosine
    for group in optimizer.param_groups:
        group["lr"] = trial.learning_rate * share


def training_batches(tokens: Any, trial: Trial) -> Iterator[Any]:
    """Yield batches [batch, 512] without end; each epoch cuts the stream at a new offset."""
    import torch

    generator = torch.Generator().manual_seed(trial.seed)
    while True:
        offset = int(torch.randint(SEQUENCE_LENGTH, (), generator=generator))
        epoch = windows_of(tokens[offset:])
        order = torch.randperm(len(epoch), generator=generator).to(tokens.device)
        for chosen in order.split(trial.batch):
            if len(chosen) == trial.batch:
                yield epoch[chosen]


def training_step(model: Any, batch: Any, optimizer: Any, clip: float) -> Any:
    """Take one optimiser step on ``batch`` [batch, 512]; return its loss, detached."""
    import torch

    model.train()
    with torch.autocast(batch.device.type, torch.bfloat16):
        loss = next_token_loss(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def heldout_loss(model: Any, tokens: Any, batch: int = 16) -> float:
    """Return the mean loss in nats over the stream's consecutive windows, in float32."""
    import torch

    model.eval()
    with torch.inference_mode():
        parts = windows_of(tokens).split(batch)
        losses = [next_token_loss(model, part) * len(part) for part in parts]
        return (torch.stack(losses).double().sum() / sum(len(part) for part in parts)).item()


def next_token_loss(model: Any, batch: Any) -> Any:
    """Return the mean cross-entropy of each token given those before it in its window."""
    import torch

    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def windows_of(tokens: Any) -> Any:
    """Cut a stream into consecutive windows [windows, 512]; the rest is left out."""
    count = len(tokens) // SEQUENCE_LENGTH
    return tokens[: count * SEQUENCE_LENGTH].view(count, SEQUENCE_LENGTH)


def load_tokens(path: Path, device: str) -> Any:
    """Return a role's ids as an int64 tensor on ``device``."""
    import torch

    return torch.from_numpy(np.load(path).astype(np.int64)).to(device)


def save_checkpoint(model: Any, tokenizer: Path, folder: Path) -> None:
    """Write weights in bfloat16, config without dropout, and the tokenizer's files."""
    import torch
    from transformers import GenerationConfig

    model.config.hidden_dropout = 0.0
    model.config.attention_dropout = 0.0
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0)
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in tokenizer.iterdir():
        shutil.copy(path, folder / path.name)


# --------------------------------------------------------------------------------- sweeping


def sweep(
    data: Path, out: Path, trials: dict[str, Trial], shape: dict[str, Any], earlier: Path | None
) -> None:
    """Train every trial at once, keep the best, evaluate it once and write everything.

    ``earlier`` names the results of an earlier sweep to keep beside this one's; its model is not
    considered again.
    """
    started = time.perf_counter()
    running = {name: start_trial(data, out / name, trial, shape) for name, trial in trials.items()}
    failed = [name for name, process in running.items() if process.wait()]
    results = {
        name: json.loads((out / name / "results.json").read_text())
        for name in trials
        if name not in failed
    }
    best = min(results, key=lambda name: results[name]["validation_loss"])
    shutil.copytree(out / best / "model", out / "model", dirs_exist_ok=True)
    summary = {
        **environment(),
        "model": shape,
        "data": json.loads((data / "data.json").read_text()),
        "sequence_length": SEQUENCE_LENGTH,
        "checkpoint_bytes": sum(path.stat().st_size for path in (out / "model").iterdir()),
        "best_trial": best,
        **results[best],
        "heldout": final_figures(data, out / "model"),
        "sweep_seconds": round(time.perf_counter() - started, 1),
        "failed_trials": failed,
        "trials": results,
    }
    for key in ("curve", "trials"):
        summary[key] = summary.pop(key)
    if earlier is not None:
        summary["earlier_sweep"] = json.loads(earlier.read_text())
    write_json(out / "results.json", summary)
    report(results, summary)


def start_trial(
    data: Path, out: Path, trial: Trial, shape: dict[str, Any]
) -> subprocess.Popen[bytes]:
    """Start ``train`` for one trial in its own process, its output in ``log.txt``."""
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "train", "--data", str(data), "--out", str(out)]
    for name, value in dataclasses.asdict(trial).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--shape", json.dumps(shape)]
    with (out / "log.txt").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def final_figures(data: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Measure the saved checkpoint, bfloat16 weights in float32 arithmetic, on held-out text."""
    import torch
    from transformers import AutoModelForCausalLM

    device = best_device()
    torch.set_float32_matmul_precision("highest")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    facts = json.loads((data / "data.json").read_text())
    figures = {}
    for role in ROLES[1:]:
        loss = heldout_loss(model, load_tokens(data / f"{role}.npy", device))
        bytes_per_token = facts[role]["bytes"] / facts[role]["tokens"]
        figures[role] = {
            "loss": loss,
            "token_perplexity": math.exp(loss),
            "bits_per_byte": loss / math.log(2) / bytes_per_token,
            "bytes_per_token": bytes_per_token,
        }
    return figures


def environment() -> dict[str, Any]:
    """Return the device and the versions, without anything that names the machine."""
    import torch
    import transformers

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report(results: dict[str, dict[str, Any]], summary: dict[str, Any]) -> None:
    """Print one line a trial and the figures of the one kept."""
    for name, result in sorted(results.items(), key=lambda item: item[1]["validation_loss"]):
        print(
            f"{name:>16}  validation {result['validation_loss']:.4f} at step {result['best_step']}"
            f" of {result['steps']}  train {result['train_loss_at_best']:.4f}"
            f"  {result['seconds']:.0f} s  ({result['stopped']})"
        )
    print(json.dumps(summary["heldout"], indent=1), f"{summary['checkpoint_bytes']} bytes")


def best_device() -> str:
    """Return ``cuda`` if there is one, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def finite(value: float) -> float | None:
    """Return ``value``, or None for infinity, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def write_json(path: Path, value: Any) -> None:
    """Write JSON with one key a line, and each point of a curve on its own line."""
    points: dict[str, str] = {}

    def shelve(node: Any) -> Any:
        if isinstance(node, dict) and "step" in node and "validation_loss" in node:
            points[key := f"@{len(points)}@"] = json.dumps(node)
            return key
        if isinstance(node, dict):
            return {name: shelve(child) for name, child in node.items()}
        return [shelve(child) for child in node] if isinstance(node, list) else node

    text = json.dumps(shelve(value), indent=2)
    for key, point in points.items():
        text = text.replace(f'"{key}"', point, 1)
    path.write_text(text + "\n")


# ----------------------------------------------------------------------------- command line


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="tokenizer and tokens (needs vdcompress)")
    preparing.add_argument("--vocabulary", type=int, default=4096)
    preparing.add_argument("--limit", type=int, help="documents a role, to try the script")
    training = commands.add_parser("train", help="one configuration")
    for field in dataclasses.fields(Trial):
        flag = f"--{field.name.replace('_', '-')}"
        training.add_argument(flag, type=type(field.default), default=field.default)
    sweeping = commands.add_parser("sweep", help="several configurations, the best kept")
    sweeping.add_argument("--time-limit", type=float, default=math.inf, help="seconds a trial")
    sweeping.add_argument("--trials", default="first", help="name in SWEEPS, or JSON of trials")
    sweeping.add_argument("--earlier", type=Path, help="results.json of an earlier sweep to keep")
    for command in (training, sweeping):
        command.add_argument("--data", type=Path, required=True, help="folder of `prepare`")
        command.add_argument("--shape", type=json.loads, default={}, help="JSON over MODEL_SHAPE")
    for command in (preparing, training, sweeping):
        command.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Run the subcommand given."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    arguments = parse_arguments()
    if arguments.command == "prepare":
        prepare(arguments.out, arguments.vocabulary, arguments.limit)
        return
    shape = MODEL_SHAPE | arguments.shape
    if arguments.command == "train":
        names = [field.name for field in dataclasses.fields(Trial)]
        trial = Trial(**{name: getattr(arguments, name) for name in names})
        train(arguments.data, arguments.out, trial, shape, best_device())
        return
    trials = SWEEPS.get(arguments.trials)
    if trials is None:
        trials = {name: Trial(**value) for name, value in json.loads(arguments.trials).items()}
    limited = {
        name: dataclasses.replace(trial, time_limit=arguments.time_limit)
        for name, trial in trials.items()
    }
    sweep(arguments.data, arguments.out, limited, shape, arguments.earlier)


if __name__ == "__main__":
    main()
