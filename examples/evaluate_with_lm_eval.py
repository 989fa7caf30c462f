"""Judge an exported folder with lm-evaluation-harness on a task made of local text.

python examples/evaluate_with_lm_eval.py [FOLDER] [--model hf|vllm] [--quick]

FOLDER is what export wrote; if left out, step_by_step.py makes one first. The task asks which line
of the standard library's held-out sources comes next, out of four; it is two files, and works with
``lm_eval`` itself as with ``vdcompress evaluate RUN --lm-eval next_line.yaml``. It needs
pip install 'lm_eval[hf]', and vLLM for --model vllm.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from vdcompress.data.corpus import Source, documents

CONTEXT, CHOICES = 6, 4
TASK = """\
task: next_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{before}}}}"
doc_to_choice: "{{{{lines}}}}"
doc_to_target: right
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def write_task(folder: Path, questions: int) -> Path:
    """Write questions and task, and return the task's YAML file."""
    draw = random.Random(0)
    lines = [
        line
        for text in documents(Source.parse("stdlib"), "evaluation")
        for line in text.splitlines(keepends=True)
        if len(line.strip()) > 8
    ]
    data = folder / "next_line.jsonl"
    with data.open("w", encoding="utf-8") as out:
        for place in draw.sample(range(CONTEXT, len(lines)), questions):
            right = draw.randrange(CHOICES)
            offered = draw.sample(lines, CHOICES)
            offered[right] = lines[place]
            before = "".join(lines[place - CONTEXT : place])
            out.write(json.dumps({"before": before, "lines": offered, "right": right}) + "\n")
    task = folder / "next_line.yaml"
    task.write_text(TASK.format(data=json.dumps(str(data))), encoding="utf-8")
    return task


def main(folder: Path, model: str, questions: int) -> None:
    """Run ``lm_eval`` as a user does, and print what it found."""
    arguments = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    if model == "vllm":
        arguments += ",enforce_eager=True"
    with tempfile.TemporaryDirectory() as made:
        task = write_task(Path(made), questions)
        answers = Path(made) / "answers"
        command = ["--model", model, "--model_args", arguments, "--tasks", str(task)]
        ended = subprocess.run(
            [sys.executable, "-m", "lm_eval", *command, "--output_path", str(answers)],
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode != 0:
            sys.exit(ended.stderr)
        [found] = answers.rglob("results_*.json")
        results = json.loads(found.read_text())["results"]["next_line"]
    for metric in ("acc", "acc_norm"):
        print(
            f"next_line {metric} {results[f'{metric},none']:.3f} of {questions} by --model {model}"
        )


def make_folder(folder: Path, quick: bool) -> None:
    """Run the other example in a process of its own."""
    script = Path(__file__).with_name("step_by_step.py")
    options = ["--quick"] if quick else []
    subprocess.run([sys.executable, script, folder, *options], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--model", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--quick", action="store_true", help="fewer questions, to see that it runs")
    given = parser.parse_args()
    count = 16 if given.quick else 200
    if given.folder is not None:
        main(given.folder, given.model, count)
    else:
        with tempfile.TemporaryDirectory() as exported:
            make_folder(Path(exported) / "model", given.quick)
            main(Path(exported) / "model", given.model, count)
