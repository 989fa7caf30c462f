"""Export a compressed model: write the artefact, reload it elsewhere, compare, then name it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdcompress.artifact import Compressed, write_artifact
from vdcompress.errors import ArtifactError

TOLERANCE = 1e-4
PROBE_TOKENS = 32
RELOAD = """
import json, sys, torch
sys.modules["vdcompress"] = None  # whatever imports it fails, as it would where it is not installed
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
folder, probe = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, local_files_only=True, dtype=torch.float32
)
ids = torch.tensor([probe["ids"]])
with torch.inference_mode():
    logits = model(ids).logits[0, -1]
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=probe["new"],
        do_sample=False,
        pad_token_id=probe["pad"],
        return_dict_in_generate=True,
    )
cache = out.past_key_values
print(json.dumps({
    "logits": logits.tolist(),
    "tokens": out.sequences[0].tolist(),
    "cache_tokens": cache.get_seq_length(),
    "cache_bytes": cache.nbytes(),
}))
"""


@dataclass(frozen=True)
class Verified:
    """What the fresh process saw.

    Attributes:
        folder: the artefact.
        logit_difference: largest absolute difference to the model in memory.
        text: what ``generate()`` wrote, prompt included.
        cache_bytes_per_token: of its cache, numbers that are not packed in float32.
    """

    folder: Path
    logit_difference: float
    text: str
    cache_bytes_per_token: float


def export(
    compressed: Compressed,
    folder: Path,
    *,
    results: Mapping[str, Any] | None = None,
    recipe: str = "",
    card: str = "",
    prompt: str = "The",
    new_tokens: int = 16,
    force: bool = False,
) -> Verified:
    """Write an artefact folder that loads without vdcompress, and prove it.

    The folder is loaded in a fresh process with ``trust_remote_code=True`` and without vdcompress;
    only if its logits are those of the model in memory does it get its name.

    Args:
        compressed: what to write; ``Compressed.of`` makes it from a base, a plan and a model.
        folder: where.
        results: for ``results.json``; this file and the next two are left out if not given.
        recipe: the merged recipe's text, for ``recipe.yaml``.
        card: the model card, for ``README.md``.
        prompt: what the fresh process continues.
        new_tokens: how many tokens it adds.
        force: replace an older artefact.

    Raises:
        RunError: if the folder is taken.
        ArtifactError: if it cannot be written, or reloads to other logits.
    """
    ids = _probe(compressed, prompt)
    with torch.inference_mode():
        expected = _stored_logits(compressed, ids)
    seen: list[Verified] = []

    def check(partial: Path) -> None:
        answer = _reload(partial, ids, new_tokens, compressed.tokenizer)
        seen.append(_compare(compressed, folder, expected, answer))

    write_artifact(
        folder, compressed, results=results, recipe=recipe, card=card, force=force, check=check
    )
    return seen[0]


def _probe(compressed: Compressed, prompt: str) -> list[int]:
    ids: list[int] = compressed.tokenizer(prompt)["input_ids"][:PROBE_TOKENS]
    return ids or [int(compressed.tokenizer.eos_token_id)]


def _stored_logits(compressed: Compressed, ids: list[int]) -> Tensor:
    """Return the last logits [vocabulary] of the model as it will be stored."""
    model = compressed.model
    device = next(model.parameters()).device
    storage = getattr(torch, compressed.dtype)
    if all(torch.equal(p, p.to(storage).to(p.dtype)) for p in model.parameters()):
        return model(torch.tensor([ids], device=device)).logits[0, -1].float().cpu()
    raise ArtifactError(
        f"the model's weights are finer than {compressed.dtype}",
        "round them first, so that what was evaluated is what is stored",
    )


def _reload(folder: Path, ids: list[int], new_tokens: int, tokenizer: Any) -> dict[str, Any]:
    """Load and run the folder in a fresh process that knows nothing of vdcompress."""
    probe = json.dumps({"ids": ids, "new": new_tokens, "pad": tokenizer.eos_token_id})
    with tempfile.TemporaryDirectory() as modules:
        finished = subprocess.run(
            [sys.executable, "-c", RELOAD, str(folder.resolve()), probe],
            capture_output=True,
            text=True,
            check=False,
            cwd=modules,
            env=os.environ | {"HF_MODULES_CACHE": modules, "HF_HUB_OFFLINE": "1"},
        )
    if finished.returncode != 0:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise ArtifactError(f"the written folder does not load in a fresh process: {reason}")
    answer: dict[str, Any] = json.loads(finished.stdout.strip().splitlines()[-1])
    return answer


def _compare(
    compressed: Compressed, folder: Path, expected: Tensor, answer: dict[str, Any]
) -> Verified:
    difference = float((torch.tensor(answer["logits"]) - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ArtifactError(
            f"the written folder reloads to other logits (largest difference {difference:.2g})"
        )
    found, tokens = answer["cache_bytes"], answer["cache_tokens"]
    planned = compressed.plan.cache_bytes(tokens, "float32")
    if found != planned:
        raise ArtifactError(
            f"its cache takes {found} bytes for {tokens} tokens instead of {planned}"
        )
    text = compressed.tokenizer.decode(answer["tokens"])
    return Verified(folder, difference, text, found / tokens)
