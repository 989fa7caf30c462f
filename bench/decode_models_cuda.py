"""Decoding of whole models on CUDA, beside the base with transformers' dynamic and static caches.

    python bench/decode_models_cuda.py                 every model, context and batch
    python bench/decode_models_cuda.py --only pythia   models whose name has this in it

Weights are random: how long a step takes depends on shapes alone. Steps are measured as plain calls
and replayed from CUDA graphs, behind caches of random numbers, all in turns; and ``generate()``
itself, from a prompt, where the static cache makes transformers compile the model. The time of its
new tokens is what it takes beyond one call that makes a single one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
from decode_cuda import device_name
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from vdcompress import families
from vdcompress.cache_kinds import DYNAMIC, OWN, STATIC
from vdcompress.decode_speed import Contender, decode, replay
from vdcompress.plan import Plan, make_plan
from vdcompress.speed_rounds import Outcome, median_speed, ratios, rounds

DTYPE = torch.bfloat16
STOCK = (DYNAMIC, STATIC)
BASE = "base"
NEW_TOKENS, REPLAYS, ROUNDS = 16, 64, 3
GENERATED, TIMES = 65, 2


@dataclass(frozen=True)
class Model:
    """A shape of the base, and what is measured of it.

    Attributes:
        config: of the base.
        plans: requests by name.
        steps: batch and context of single steps.
        generated: batch and prompt of ``generate()``.
        compiled: compressed models that ``generate()`` also runs with a static cache.
    """

    config: PreTrainedConfig
    plans: dict[str, dict[str, Any]]
    steps: tuple[tuple[int, int], ...]
    generated: tuple[tuple[int, int], ...] = ()
    compiled: tuple[str, ...] = ()


PYTHIA = GPTNeoXConfig(
    vocab_size=50304,
    hidden_size=512,
    num_hidden_layers=6,
    num_attention_heads=8,
    intermediate_size=2048,
    rotary_pct=0.25,
    max_position_embeddings=65536,
)
LLAMA = LlamaConfig(
    vocab_size=128256,
    hidden_size=2048,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=8192,
    max_position_embeddings=65536,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)
HALF = {"v_dim": 320, "k_dim": 320}
SHARED = {"v_dim": 192, "k_dim": 192, "groups": 1, "k_rotary_dim": 64}
MODELS = {
    "pythia-70m": Model(
        PYTHIA,
        {
            "V 320, K 320": HALF,
            "V 320, K 320, 8 bits": HALF | {"bits": 8},
            "V 320, K 320, 4 bits": HALF | {"bits": 4},
            "one latent of 192": SHARED,
            "one latent of 192, 4 bits": SHARED | {"bits": 4},
            "8 bits": {"bits": 8},
            "4 bits": {"bits": 4},
        },
        ((1, 1024), (1, 32768), (8, 8192), (32, 8192)),
        ((1, 2048), (32, 2048)),
        ("V 320, K 320",),
    ),
    "llama-3.2-1b": Model(
        LLAMA,
        {
            "V 320, K 320": HALF,
            "V 320, K 320, 4 bits": HALF | {"bits": 4},
            "8 bits": {"bits": 8},
            "4 bits": {"bits": 4},
        },
        ((1, 32768), (8, 8192), (32, 8192)),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="models whose name has this in it")
    parser.add_argument("--skip", choices=("steps", "generate"), nargs="*", default=[])
    parser.add_argument("--layers", type=int, help="of a model, to try the script")
    parser.add_argument("--context", type=int, help="of everything, to try the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    name = f"decode-models-{device_name()}"
    body: dict[str, Any] = {"dtype": "bfloat16", "new_tokens": NEW_TOKENS, "replays": REPLAYS}
    body |= {"rounds": ROUNDS, "generated": GENERATED, "steps": [], "generate": []}
    for model_name, model in MODELS.items():
        if options.only not in model_name:
            continue
        if options.layers:
            model.config.num_hidden_layers = options.layers
        contenders = contenders_of(model)
        for part, shapes, measure in (
            ("steps", model.steps, step_rows),
            ("generate", model.generated, generate_rows),
        ):
            for batch, context in () if part in options.skip else shapes:
                found = measure(model, contenders, batch, options.context or context)
                body[part] += [{"model": model_name} | row for row in found]
                record.write(name, body, out=options.out)
        del contenders
        torch.cuda.empty_cache()
    print(record.write(name, body, out=options.out))


def contenders_of(model: Model) -> list[Contender]:
    """Return the base with each of transformers' caches, and every compressed model."""
    family = families.get(model.config.model_type)
    shape = family.shape(model.config)
    base = built(family.base_class(), model.config)
    full = (shape.full_layout(),) * shape.layers
    found = [Contender(f"{BASE}, {kind.name} cache", base, full, kind) for kind in STOCK]
    for name, asked in model.plans.items():
        plan: Plan = make_plan(shape, **asked)
        config = family.compressed_config(model.config, plan)
        found.append(Contender(name, built(family.compressed_class(), config), plan.layers, OWN))
    return found


def built(model_class: Any, config: PreTrainedConfig) -> Any:
    """Return a model with random weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device("cuda"):
            return model_class(config).eval()
    finally:
        torch.set_default_dtype(before)


def step_rows(
    _model: Model, contenders: Sequence[Contender], batch: int, context: int
) -> list[dict[str, Any]]:
    """Return the speeds of single steps, as plain calls and from graphs, in turns."""
    measure = partial(decode, context=context, batch=batch, new_tokens=NEW_TOKENS)
    plain = rounds(contenders, measure, ROUNDS, optional=True)
    measure = partial(replay, context=context, batch=batch, replays=REPLAYS)
    graphs = rounds(contenders, measure, ROUNDS, optional=True)
    others = [contender.name for contender in contenders[: len(STOCK)]]
    rows = []
    for contender in contenders:
        name = contender.name
        row: dict[str, Any] = {"cache": name, "batch": batch, "context": context}
        passes = plain[name]
        row["cache_bytes"] = None if isinstance(passes, str) else passes[0].cache_bytes
        row |= speeds("plain", plain, name, others) | speeds("graph", graphs, name, others)
        rows.append(row)
        print(row, flush=True)
    return rows


def speeds(
    kind: str, found: dict[str, Outcome], name: str, others: Sequence[str]
) -> dict[str, Any]:
    """Return tokens per second, and by how much that is more than others', or why not."""
    passes = found[name]
    if isinstance(passes, str):
        return {kind: None, f"{kind}_reason": passes}
    faster = dict(zip((k.name for k in STOCK), ratios(found, name, others).values(), strict=False))
    return {kind: median_speed(passes), f"{kind}_faster_than": faster}


def generate_rows(
    model: Model, contenders: Sequence[Contender], batch: int, prompt: int
) -> list[dict[str, Any]]:
    """Return the seconds of ``generate()``: to the first token, and for each that follows."""
    rows = []
    for contender in contenders:
        caches = [None] if contender.kind is OWN else [contender.kind.name]
        caches += ["static"] if contender.name in model.compiled else []
        for kind in caches:
            named = None if kind in {None, DYNAMIC.name} else kind
            row: dict[str, Any] = {"cache": contender.name, "batch": batch, "prompt": prompt}
            row |= {"compiled": named == STATIC.name}
            row |= generated(contender.model, batch, prompt, named)
            rows.append(row)
            print(row, flush=True)
            torch.compiler.reset()
            torch.cuda.empty_cache()
    return rows


def generated(model: Any, batch: int, prompt: int, cache: str | None) -> dict[str, Any]:
    """Return the seconds of the first token and of each one after it, medians."""
    ids = torch.randint(model.config.vocab_size, (batch, prompt), device="cuda")
    call = partial(
        model.generate,
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **({} if cache is None else {"cache_implementation": cache}),
    )
    try:
        call(max_new_tokens=GENERATED)
        one = statistics.median(clocked(partial(call, max_new_tokens=1)) for _ in range(TIMES))
        all_of_them = statistics.median(
            clocked(partial(call, max_new_tokens=GENERATED)) for _ in range(TIMES)
        )
    except RuntimeError as error:
        return {"reason": str(error).splitlines()[0]}
    step = (all_of_them - one) / (GENERATED - 1)
    return {"first_token": one, "step": step, "tokens_per_second": batch / step}


def clocked(call: Any) -> float:
    """Return the seconds of a call."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
