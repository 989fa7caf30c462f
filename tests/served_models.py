"""Small models for serving engines: random bases whose shapes engines take, and their layouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADS, KV_HEADS, WIDTH = 8, 8, 64


@dataclass(frozen=True)
class Layout:
    """What a compressed model keeps.

    Attributes:
        asked: arguments of a request; empty for the base itself.
        k: width of a K latent.
        v: width of a V latent.
        groups: latents per side.
        gain: tokens per GiB, as a multiple of the base's, that the engine has to report.
    """

    asked: dict[str, int]
    k: int
    v: int
    groups: int
    gain: float


LAYOUTS = {
    "64-64": Layout({"v_dim": 512}, 64, 64, 8, 1.0),
    "64-40": Layout({"v_dim": 320}, 64, 40, 8, 1.2),
    "40-40": Layout({"v_dim": 320, "k_dim": 320}, 40, 40, 8, 1.55),
    "192-192": Layout({"v_dim": 192, "k_dim": 192, "groups": 1}, 192, 192, 1, 2.6),
    "2x128": Layout({"v_dim": 256, "k_dim": 256, "groups": 2}, 128, 128, 2, 1.95),
}
FAMILIES = ("gpt_neox", "llama")


def make_base(family: str, folder: Path, tokenizer: Any) -> Path:
    """Write a random base of 2 layers with 8 key/value heads of 64."""
    import torch

    from vdcompress import families

    model_class = families.get(family).base_class()
    config = {
        "vocab_size": 264,
        "num_hidden_layers": 2,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    if family == "gpt_neox":
        config |= {"hidden_size": HEADS * WIDTH, "num_attention_heads": HEADS}
    else:
        config |= {
            "hidden_size": 256,
            "num_attention_heads": 2 * KV_HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": WIDTH,
        }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = model_class(model_class.config_class(**config))
        for name, parameter in model.named_parameters():
            scale = parameter.dim() == 1 and name.endswith("weight")  # of a norm
            torch.nn.init.normal_(parameter, mean=float(scale), std=0.06)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_served(base: Path, name: str, folder: Path, *, fold: bool = False) -> Path:
    """Write a compressed model of one layout as ``export`` does, but for the proof.

    Args:
        base: folder of the base.
        name: of the layout.
        folder: where.
        fold: fold the maps, as ``export --for vllm`` does.
    """
    import torch

    import vdcompress as vd
    from vdcompress.artifact import write_artifact
    from vdcompress.calibrate import EVERYTHING
    from vdcompress.folding import folded
    from vdcompress.gains import gains

    loaded = vd.load(base)
    generator = torch.Generator().manual_seed(4)
    windows = torch.randint(1, loaded.config.vocab_size, (16, 64), generator=generator)
    statistics = vd.calibrate(loaded, windows, needs=EVERYTHING, batch=4)
    found = gains(loaded.shape, statistics)
    plan = vd.plan_for(loaded.shape, vd.Request.of(**LAYOUTS[name].asked), gains=found)
    compressed = vd.Compressed.of(loaded, plan, vd.rewrite(loaded, plan, statistics))
    write_artifact(folder, folded(compressed) if fold else compressed)
    return folder
