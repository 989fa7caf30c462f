"""Load an exported folder with transformers alone, and look at the cache that it leaves.

python examples/reload_anywhere.py [FOLDER] [--quick]

FOLDER is what export wrote; if left out, step_by_step.py makes one first. Nothing below imports
vdcompress: the folder carries its own modelling code, which is why it must be trusted.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer


def main(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    prompt = tokenizer("def read(self):", return_tensors="pt")
    output = model.generate(
        **prompt,
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    print(f"it writes: {tokenizer.decode(output.sequences[0])!r}")
    cache = output.past_key_values
    print("layer  keys [batch, heads, tokens, width]  values")
    for number, layer in enumerate(cache.layers):
        print(f"{number:5}  {list(layer.keys.shape)!s:36}{list(layer.values.shape)}")
    tokens = cache.get_seq_length()
    print(f"{cache.nbytes():,} bytes for {tokens} tokens in {layer.keys.dtype}")


def make_folder(folder: Path, quick: bool) -> None:
    """Run the other example in a process of its own."""
    script = Path(__file__).with_name("step_by_step.py")
    options = ["--quick"] if quick else []
    subprocess.run([sys.executable, script, folder, *options], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--quick", action="store_true", help="less text, to see that it runs")
    given = parser.parse_args()
    if given.folder is not None:
        main(given.folder)
    else:
        with tempfile.TemporaryDirectory() as made:
            make_folder(Path(made) / "exported", given.quick)
            main(Path(made) / "exported")
