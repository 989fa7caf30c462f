"""Write the token arrays that the healing benches read, so that a GPU's machine needs no text.

    VDCOMPRESS_STANDINS=... python bench/healing_tokens.py tokens-heal.npz

``train`` is the whole training part of the training text in a shuffled order of documents,
``seed-train`` and ``train-100k-128`` are short sequences drawn from it; what validates comes from
the validation part. Nothing of the texts that measure is in any of them.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import standins
from torch import Tensor

from vdcompress.data.corpus import Role, Source, documents
from vdcompress.data.windows import draw_windows, tokenise
from vdcompress.load import read_tokenizer

SEED = 0
DRAWN: dict[str, tuple[Role, int, int]] = {
    "seed-train": ("training", 10_000, 128),
    "train-100k-128": ("training", 100_000, 128),
    "validation-128": ("validation", 1_000, 128),
    "validation-1024": ("validation", 128, 1024),
}


def main() -> None:
    tokenizer = read_tokenizer(standins.model("pythia-70m-standin"))
    source = Source.parse(str(standins.training_text()))

    def draw(role: Role, count: int, length: int) -> Tensor:
        text = documents(source, role)
        return draw_windows(text, tokenizer, count=count, length=length, seed=SEED)

    found = {name: draw(*asked) for name, asked in DRAWN.items()}
    texts = list(documents(source, "training"))
    random.Random(SEED).shuffle(texts)
    found["train"] = tokenise(texts, tokenizer)
    arrays = {name: ids.numpy().astype(np.uint16) for name, ids in found.items()}
    np.savez_compressed(sys.argv[1], **arrays)
    for name, ids in found.items():
        print(f"{name}: {tuple(ids.shape)}")
    print(f"{Path(sys.argv[1]).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
