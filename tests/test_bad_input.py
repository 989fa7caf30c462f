"""Bad input ends in one clear line and the right exit code, and leaves nothing half-written."""

from __future__ import annotations

import errno
import json
import shutil
import signal as signals
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Ended, Vdcompress
from vdcompress.cli.session import Terminated

PROGRAM = "from vdcompress.cli.app import main; main()"
APPLY = ("--v-dim", "32", "--samples", "8", "--seq-len", "64", "--windows", "2")


def assert_refused(ended: Ended, code: int, *says: str) -> None:
    """The error is one line, with perhaps a hint; nothing is on stdout or on disk."""
    lines = [line for line in ended.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert ended.code == code, ended.err
    assert lines, ended.err
    assert lines[0].startswith("error: ")
    assert ended.err.splitlines()[-len(lines) :] == lines
    for words in says:
        assert words in "\n".join(lines)
    assert ended.out == ""
    assert left_behind() == []


def left_behind() -> list[Path]:
    """Return what a command wrote under the current folder, hidden or not."""
    return [path for name in ("runs", "exports", "out") for path in Path(name).glob("**/*")]


@pytest.fixture
def broken(tiny_neox: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a copy of the tiny model without some of its files."""

    def copy(*missing: str, **config: Any) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_neox, folder)
        for pattern in missing:
            for path in folder.glob(pattern):
                path.unlink()
        if config:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return folder

    return copy


def test_unknown_model_id_with_the_hub_unreachable(
    vdcompress: Vdcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("vdcompress.hub.snapshot_download", unreachable)
    ended = vdcompress("apply", "someone/model", *APPLY)
    assert_refused(ended, 3, "the hub cannot be reached", "someone/model")
    ended = vdcompress("apply", "pythia-7m", *APPLY)
    assert_refused(ended, 3, "did you mean 'pythia-70m'")


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        (["config.json"], "no config.json"),
        (["*.safetensors"], "no *.safetensors"),
        (["tokenizer*", "special_tokens_map.json"], "no tokenizer"),
    ],
)
def test_a_folder_that_lacks_a_part(
    vdcompress: Vdcompress,
    broken: Callable[..., Path],
    text_file: Path,
    missing: list[str],
    says: str,
) -> None:
    ended = vdcompress("apply", broken(*missing), *APPLY, "--data", text_file)
    assert_refused(ended, 3, says)


def test_a_model_type_that_no_family_handles(
    vdcompress: Vdcompress, broken: Callable[..., Path]
) -> None:
    ended = vdcompress("apply", broken(model_type="gpt2"), *APPLY)
    assert_refused(ended, 3, "'gpt2'", "gpt_neox, llama")


def test_truncated_weights(
    vdcompress: Vdcompress, broken: Callable[..., Path], text_file: Path
) -> None:
    folder = broken()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    ended = vdcompress("apply", folder, *APPLY, "--data", text_file)
    assert_refused(ended, 3, "cannot be read", "make it again if it is a run")


def test_weights_with_nan(
    vdcompress: Vdcompress, broken: Callable[..., Path], text_file: Path
) -> None:
    from safetensors.torch import load_file, save_file

    path = broken() / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if "query_key_value.weight" in name)
    state[name][0, 0] = float("nan")
    save_file(state, path, metadata={"format": "pt"})
    ended = vdcompress("apply", path.parent, *APPLY, "--data", text_file)
    assert_refused(ended, 3, name, "NaN")


def test_a_checkpoint_that_is_compressed_already(
    vdcompress: Vdcompress, tiny_run: Path, text_file: Path
) -> None:
    ended = vdcompress("apply", tiny_run, *APPLY, "--data", text_file)
    assert_refused(ended, 3, "compressed already")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no text"),
        (b"\n \n", "no text"),
        (b"\x00\x01binary\x00" * 99, ""),
        (b"\xff\xfe\xfa" * 99, ""),
        (b"too short", "too short"),
    ],
)
def test_text_that_is_empty_binary_or_short(
    vdcompress: Vdcompress, tiny_neox: Path, content: bytes, says: str
) -> None:
    Path("data.txt").write_bytes(content)
    ended = vdcompress("apply", tiny_neox, *APPLY, "--data", "data.txt")
    assert_refused(ended, 3, says)


def test_text_that_is_not_there(vdcompress: Vdcompress, tiny_neox: Path) -> None:
    ended = vdcompress("apply", tiny_neox, *APPLY, "--data", "nowhere.jsonl")
    assert_refused(ended, 3, "nowhere.jsonl", "--data")


def test_a_dataset_with_the_hub_unreachable(
    vdcompress: Vdcompress, tiny_neox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    ended = vdcompress("apply", tiny_neox, *APPLY)
    assert_refused(ended, 3, "cannot reach the hub", "--data stdlib")


def test_too_few_calibration_tokens(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path
) -> None:
    few = ("--v-dim", "32", "--samples", "1", "--seq-len", "16", "--windows", "1")
    ended = vdcompress("apply", tiny_neox, *few, "--data", text_file)
    assert_refused(ended, 3, "16 calibration tokens are too few", "--samples")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("pan: {v_dim: 32}", "unknown key 'pan', did you mean 'plan'?"),
        ("plan: {v_dims: 32}", "unknown key 'plan.v_dims', did you mean 'v_dim'?"),
    ],
)
def test_a_recipe_with_an_unknown_key(
    vdcompress: Vdcompress, tiny_neox: Path, line: str, says: str
) -> None:
    Path("mine.yaml").write_text(f"version: 1\n{line}\n")
    assert_refused(vdcompress("apply", tiny_neox, "--recipe", "mine.yaml"), 3, says)


def test_too_little_text_to_measure_is_said_before_the_work(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path
) -> None:
    Path("little.txt").write_text("a few words")
    arguments = (*APPLY, "--data", text_file, "--eval-data", "little.txt")
    ended = vdcompress("apply", tiny_neox, *arguments)
    assert_refused(ended, 3, "fewer than one window of 256")
    assert "calibrate" not in ended.err


def test_a_recipe_of_a_future_version(vdcompress: Vdcompress, tiny_neox: Path) -> None:
    Path("mine.yaml").write_text("version: 99\n")
    ended = vdcompress("apply", tiny_neox, "--recipe", "mine.yaml")
    assert_refused(ended, 3, "of version 99", "install a newer vdcompress")


@pytest.mark.parametrize("command", ["finetune", "evaluate", "export", "inspect"])
def test_no_run_at_all(vdcompress: Vdcompress, command: str) -> None:
    assert_refused(vdcompress(command), 3, "no finished run", "vdcompress apply")


@pytest.mark.parametrize("command", ["finetune", "evaluate", "export"])
def test_a_run_that_does_not_exist(vdcompress: Vdcompress, command: str) -> None:
    assert_refused(vdcompress(command, "runs/nothing"), 3, "does not exist")


@pytest.mark.parametrize("command", ["finetune", "evaluate", "export", "inspect"])
def test_a_run_that_was_interrupted(vdcompress: Vdcompress, command: str) -> None:
    partial = Path("other/r-healed-1.partial")
    partial.mkdir(parents=True)
    ended = vdcompress(command, partial)
    assert_refused(ended, 3, "was interrupted", f"finetune --resume {partial}")


def test_nothing_to_resume(vdcompress: Vdcompress) -> None:
    assert_refused(vdcompress("finetune", "--resume"), 3, "no interrupted finetune")


def test_resume_keeps_its_settings(vdcompress: Vdcompress) -> None:
    ended = vdcompress("finetune", "--resume", "--epochs", "3", "--no-distill")
    assert_refused(ended, 2, "--distill, --epochs")


def test_an_output_folder_that_is_not_empty(
    vdcompress: Vdcompress, tiny_neox: Path, tiny_run: Path, text_file: Path
) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("keep me")
    for arguments in (
        ("apply", tiny_neox, *APPLY, "--data", text_file),
        ("finetune", tiny_run),
        ("export", tiny_run),
    ):
        ended = vdcompress(*arguments, "-o", "mine", "--force")
        assert_refused(ended, 3, "mine is not empty")
    assert [path.name for path in Path("mine").iterdir()] == ["thesis.txt"]


def test_an_output_folder_that_holds_a_run(vdcompress: Vdcompress, tiny_run: Path) -> None:
    assert_refused(vdcompress("export", tiny_run, "-o", tiny_run), 3, "--force")


def test_a_finetune_that_would_replace_what_it_heals(
    vdcompress: Vdcompress, tiny_run: Path
) -> None:
    before = (tiny_run / "results.json").read_bytes()
    ended = vdcompress("finetune", tiny_run, "-o", tiny_run, "--force")
    assert_refused(ended, 3, "is what is to be healed", "name another folder")
    assert (tiny_run / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("v_dim", "says"),
    [
        ("0", "not above zero"),
        ("-8", "not above zero"),
        ("128", "above the model's 64"),
        ("30", "not divisible by 4 key/value heads"),
    ],
)
def test_widths_that_do_not_fit(
    vdcompress: Vdcompress, tiny_neox: Path, v_dim: str, says: str
) -> None:
    ended = vdcompress("apply", tiny_neox, "--v-dim", v_dim, "--dry-run")
    assert_refused(ended, 2, says, "try --v-dim with one of 32, 64")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "how wide?"),
        (["--v-dim", "32", "--initializer", "optimum"], "did you mean 'optimal'"),
        (["--v-dim", "32", "--device", "cuda:99"], "device"),
        (["--v-dim", "32", "--device", "toaster"], "not a device"),
        (["--v-dim", "32", "--positions", "a,b"], "two or more ascending numbers"),
        (["--v-dim", "32", "--positions", "5,3"], "two or more ascending numbers"),
        (["--bits", "4", "--sinks", "2000", "--window", "48"], "leave none of 2,048 tokens"),
    ],
)
def test_options_that_make_no_sense(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path, arguments: list[str], says: str
) -> None:
    ended = vdcompress("apply", tiny_neox, "--data", text_file, *arguments)
    assert_refused(ended, 2, says)


def test_no_model_at_all(vdcompress: Vdcompress) -> None:
    assert_refused(vdcompress("apply", "--v-dim", "32"), 2, "which model?")


def test_no_space_left_in_the_middle_of_an_export(tiny_run: Path, tmp_path: Path) -> None:
    """The limit on a file's size makes the real write of the weights fail."""
    command = f"ulimit -f 60; exec {sys.executable} -c '{PROGRAM}' export {tiny_run}"
    ended = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ended.returncode == 3, ended.stderr
    assert "error: " in ended.stderr
    assert "no space left" in ended.stderr.lower() or "file too large" in ended.stderr.lower()
    assert not list((tmp_path / "exports").glob("*"))


@pytest.mark.parametrize("call", ["shutil.copyfile", "json.dumps", "save_torch_state_dict"])
def test_no_space_left_wherever_it_happens(
    vdcompress: Vdcompress, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"vdcompress.artifact.{call}", full)
        ended = vdcompress("export", tiny_run)
    assert_refused(ended, 3, "space")


STAGES = ("load", "read text", "calibrate", "rewrite", "evaluate", "cache", "write")


@pytest.mark.parametrize(
    ("stage", "signal"),
    [*((stage, KeyboardInterrupt) for stage in STAGES), ("calibrate", Terminated)],
)
def test_interrupted_at_each_stage_of_apply(
    vdcompress: Vdcompress,
    tiny_neox: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    signal: type[KeyboardInterrupt],
) -> None:
    interrupt_at(monkeypatch, stage, signal)
    ended = vdcompress("apply", tiny_neox, *APPLY, "--data", text_file)
    assert ended.code == (143 if signal is Terminated else 130)
    assert ended.err.splitlines()[-1] == "interrupted: nothing was written"
    assert ended.out == ""
    assert left_behind() == []


def test_an_interrupted_finetune_keeps_its_checkpoints_and_resumes(
    vdcompress: Vdcompress, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heal = ("--samples", "16", "--seq-len", "32", "--epochs", "3", "--patience", "3", "--json")
    with monkeypatch.context() as patch:
        interrupt_at(patch, "epoch 2", KeyboardInterrupt)
        ended = vdcompress("finetune", tiny_run, *heal)
    assert ended.code == 130
    [partial] = Path("runs").iterdir()
    assert ended.err.splitlines()[-2:] == [
        f"interrupted: checkpoints are kept in {partial}",
        f"hint: continue with: vdcompress finetune --resume {partial}",
    ]
    assert vdcompress("export", partial).code == 3
    whose = (partial / "heal.json").read_bytes()
    (partial / "heal.json").write_bytes(whose[:10])
    damaged = vdcompress("finetune", "--resume")
    assert damaged.code == 3
    assert "no readable heal.json" in damaged.err
    assert "continue with" not in damaged.err
    (partial / "heal.json").write_bytes(whose)
    resumed = vdcompress("finetune", "--resume", "--json")
    assert resumed.code == 0, resumed.err
    [run] = Path("runs").iterdir()
    whole = vdcompress("finetune", tiny_run, *heal).json["healing"]
    assert resumed.json["run"] == str(run)
    found = resumed.json["healing"]
    assert [epoch["val_ppl"] for epoch in found["epochs"]] == pytest.approx(
        [epoch["val_ppl"] for epoch in whole["epochs"]]
    )


# a job in the background begins with SIGINT ignored
LISTENS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def test_interrupted_by_a_real_signal(tiny_neox: Path, text_file: Path, tmp_path: Path) -> None:
    many = ("--v-dim", "32", "--samples", "3000", "--seq-len", "16")
    command = ["apply", tiny_neox, *many, "--data", text_file]
    process = subprocess.Popen(
        [sys.executable, "-c", LISTENS + PROGRAM, *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stderr
    for line in process.stderr:
        if line.startswith("read text"):
            process.send_signal(signals.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    assert rest.splitlines()[-1] == "interrupted: nothing was written"
    assert not (tmp_path / "runs").exists()


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch, stage: str, error: type[KeyboardInterrupt]
) -> None:
    """Let the display raise what Ctrl-C raises, when a stage begins or an epoch ends."""
    from vdcompress.cli.progress import Display
    from vdcompress.events import EpochEnded, Event, StageStarted

    show = Display.__call__

    def raising(self: Display, event: Event) -> None:
        if isinstance(event, StageStarted) and event.stage == stage:
            raise error
        if isinstance(event, EpochEnded) and f"epoch {event.epoch}" == stage:
            raise error
        show(self, event)

    monkeypatch.setattr(Display, "__call__", raising)
