"""What gradient descent on the calibration windows makes of the closed form: a bound for its shape.

    VDCOMPRESS_STANDINS=... python bench/latent_bound.py --device cuda

All attention weights are trained by the KL divergence to the base on the windows that calibrated,
from the closed form on. This is no training-free figure; it says how far one could get.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import perplexity
import record
import standins
import token_sets
import torch
from keys_and_groups import FISHER
from torch.nn import functional

from vdcompress.calibrate import EVERYTHING, calibrate
from vdcompress.gains import gains
from vdcompress.load import Base, load
from vdcompress.plan import plan_for
from vdcompress.request import Request

MODEL = "pythia-70m-standin"
ASKED: tuple[dict[str, Any], ...] = (
    {"v_dim": 320, "k_dim": 320},
    {"v_dim": 192, "k_dim": 192, "groups": 1},
    {"v_dim": 320, "groups": 1},
)
BATCH, RATE = 4, 2e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--windows", type=int, default=token_sets.WINDOWS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = load(standins.model(MODEL), device=options.device)
    sets = token_sets.read()
    windows = sets[token_sets.CALIBRATION]
    statistics = calibrate(base, windows, needs=EVERYTHING)
    found = gains(base.shape, statistics)
    settings = {"epochs": options.epochs, "batch": BATCH, "learning_rate": RATE}
    body: dict[str, Any] = {"model": MODEL, "samples": len(windows), **settings, "rows": []}
    for asked in ASKED:
        plan = plan_for(base.shape, Request.of(**asked), FISHER, found)
        model = perplexity.compress(base, plan, statistics, windows)
        before = perplexity.measure_all(base, model, sets, options.windows)
        losses = descend(base, model, windows, options.epochs)
        after = perplexity.measure_all(base, model, sets, options.windows)
        body["rows"].append(
            {"asked": asked, "closed_form": before, "descended": after, "kl_by_epoch": losses}
        )
        print(asked, perplexity.line(before), "->", perplexity.line(after), losses, flush=True)
        path = record.write("latent-bound-pythia-70m-standin", body, out=options.out)
    print(path)


def descend(base: Base, model: Any, windows: torch.Tensor, epochs: int) -> list[float]:
    """Train the attention of ``model`` and return the mean divergence of each epoch."""
    model.requires_grad_(False)
    attentions = base.family.attention_modules(model)
    for attention in attentions:
        for name, weight in attention.named_parameters():
            owner, _, leaf = name.rpartition(".")
            fresh = torch.nn.Parameter(weight.detach().clone())
            setattr(attention.get_submodule(owner), leaf, fresh)
    weights = [weight for attention in attentions for weight in attention.parameters()]
    optimizer = torch.optim.Adam(weights, lr=RATE)
    steps = epochs * -(-len(windows) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order, losses = torch.Generator().manual_seed(0), []
    for _ in range(epochs):
        total = 0.0
        for places in torch.randperm(len(windows), generator=order).split(BATCH):
            ids = windows[places].to(model.device)
            with torch.no_grad():
                wanted = base.model(ids, use_cache=False).logits.log_softmax(-1)
            found = model(ids, use_cache=False).logits.log_softmax(-1)
            loss = functional.kl_div(found, wanted, log_target=True, reduction="sum") / ids.numel()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(ids)
        losses.append(total / len(windows))
    return losses


if __name__ == "__main__":
    main()
