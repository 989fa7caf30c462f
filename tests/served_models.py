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
# the trained Llama has two key/value heads: its own equivalents, and widths that engines compile
TWO_HEADS = {
    "64-64": Layout({"v_dim": 128}, 64, 64, 2, 1.0),
    "64-40": Layout({"v_dim": 80}, 64, 40, 2, 1.2),
    "40-40": Layout({"v_dim": 80, "k_dim": 80}, 40, 40, 2, 1.55),
    "1x64": Layout({"v_dim": 64, "k_dim": 64, "groups": 1}, 64, 64, 1, 1.95),
    "2x32": Layout({"v_dim": 64, "k_dim": 64}, 32, 32, 2, 1.95),
}
STANDINS = {"pythia-70m-standin": LAYOUTS, "llama-32m-standin": TWO_HEADS}


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


class Served:
    """A base, calibrated once, and what compresses it to any layout."""

    def __init__(self, base: Path) -> None:
        import torch

        import vdcompress as vd
        from vdcompress.calibrate import EVERYTHING
        from vdcompress.gains import gains

        self.base = vd.load(base)
        generator = torch.Generator().manual_seed(4)
        windows = torch.randint(1, self.base.config.vocab_size, (64, 64), generator=generator)
        self.statistics = vd.calibrate(self.base, windows, needs=EVERYTHING, batch=16)
        self.gains = gains(self.base.shape, self.statistics)

    def write(self, asked: dict[str, int], folder: Path, *, fold: bool = False) -> Path:
        """Write a compressed model as ``export`` does, but for the proof.

        Args:
            asked: arguments of a request.
            folder: where.
            fold: fold the maps, as ``export --for vllm`` does.
        """
        return self.write_plan(self.plan(asked), folder, fold=fold)

    def plan(self, asked: dict[str, int]) -> Any:
        """Return the plan of a request."""
        import vdcompress as vd

        return vd.plan_for(self.base.shape, vd.Request.of(**asked), gains=self.gains)

    def write_plan(self, plan: Any, folder: Path, *, fold: bool = False) -> Path:
        """Write what a plan makes of the base."""
        import vdcompress as vd
        from vdcompress.artifact import write_artifact
        from vdcompress.folding import folded

        model = vd.rewrite(self.base, plan, self.statistics)
        compressed = vd.Compressed.of(self.base, plan, model)
        return write_artifact(folder, folded(compressed) if fold else compressed)
