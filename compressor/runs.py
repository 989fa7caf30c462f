"""Run folders: how they are named, and how to find them again.

A run is a finished artefact folder, marked by its ``vdcompress.json``. A finetune that is under
way keeps its checkpoints in ``<run>.partial``; nothing that is unfinished is taken for a run.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from vdcompress.errors import RunError, did_you_mean

ROOT = Path("runs")
MARKER = "vdcompress.json"
PARTIAL = ".partial"
HEALED = "healed"
FROM_SCRATCH, HEALS = "train.json", "finetune.json"

_TIMES = re.compile(r"-\d{8}-\d{6}(-\d+)?(?=-|$)")
_STAMP = re.compile(r"-\d{8}-\d{6}(-\d+)?$")
_HEALED = re.compile(rf"-{HEALED}-\d{{8}}-\d{{6}}(-\d+)?$")


def is_finished(folder: Path) -> bool:
    """Say whether a folder holds a finished artefact."""
    return folder.suffix != PARTIAL and (folder / MARKER).is_file()


def new_run(model: str, label: str, root: Path = ROOT) -> Path:
    """Return a path that is free, such as ``runs/pythia-70m-v320-20260131-142210``.

    Args:
        model: alias, hub id or folder; its last part names the run.
        label: what was done, such as ``v320``.
        root: the folder of all runs.
    """
    return _free(root, f"{slug(model)}-{label}")


def new_healed(run: Path, root: Path = ROOT) -> Path:
    """Return a free path for a finetune of ``run``; healing again does not pile up suffixes."""
    return _free(root, f"{_HEALED.sub('', run.name)}-{HEALED}")


def partial_of(run: Path) -> Path:
    """Return where a finetune that will become ``run`` keeps its checkpoints.

    Raises:
        RunError: no run can have that path.
    """
    named = run if run.name not in {"", ".."} else run.resolve()
    if not named.name:
        raise RunError(f"{run} cannot be the folder of a run", "name another folder")
    return named.with_name(named.name + PARTIAL)


def finished_of(partial: Path) -> Path:
    """Return the run that a partial folder will become."""
    return partial.with_name(partial.name.removesuffix(PARTIAL))


def command(*words: str | Path) -> str:
    """Return what a user types for a command of ours, names quoted where a shell needs it."""
    return shlex.join(("vdcompress", *map(str, words)))


def resuming(partial: Path) -> str:
    """Return the command that continues an interrupted run."""
    verb = "train" if (partial / FROM_SCRATCH).is_file() else "finetune"
    return command(verb, "--resume", partial)


def finished(root: Path = ROOT) -> list[Path]:
    """Return the finished runs, the latest last."""
    return sorted(filter(is_finished, _folders(root)), key=lambda run: (_age(run / MARKER), run))


def partials(root: Path = ROOT, *, scratch: bool = False) -> list[Path]:
    """Return the finetunes that were interrupted, the latest last.

    Args:
        root: the folder of all runs.
        scratch: those from scratch instead.
    """
    found = [
        folder
        for folder in _folders(root)
        if folder.suffix == PARTIAL and (folder / FROM_SCRATCH).is_file() == scratch
    ]
    return sorted(found, key=lambda folder: (_age(folder), folder))


def latest(root: Path = ROOT) -> Path:
    """Return the run that finished last.

    Raises:
        RunError: there is none.
    """
    runs = finished(root)
    if not runs:
        raise RunError(
            f"no finished run under ./{root}",
            "name one, or start with: vdcompress apply MODEL --v-dim N",
        )
    return runs[-1]


def resolve(run: str | Path | None, root: Path = ROOT) -> Path:
    """Find a run by its folder, or by its name under ``root``; None is the latest.

    Raises:
        RunError: it does not exist, or it was interrupted.
    """
    if run is None:
        return latest(root)
    path = Path(run)
    if not path.is_dir() and (root / path).is_dir():
        path = root / path
    if is_finished(path):
        return path
    partial = path if path.suffix == PARTIAL else partial_of(path)
    if partial.is_dir():
        raise RunError(
            f"run {path} was interrupted before it finished",
            f"continue it with: {resuming(partial)}",
        )
    if path.exists():
        raise RunError(f"{path} is not a finished run: no {MARKER} in it", _known(path, root))
    raise RunError(f"run {run} does not exist", _known(path, root))


def resolve_partial(run: str | Path | None, root: Path = ROOT, *, scratch: bool = False) -> Path:
    """Find an interrupted finetune: by its folder, by the run it heals, or the latest.

    By the run, among the folders under ``root``, beside the run, and here.

    Args:
        run: its folder or the run; None is the latest.
        root: the folder of all runs.
        scratch: find a training from scratch instead.

    Raises:
        RunError: there is none, or another command continues it.
    """
    if run is None:
        found = partials(root, scratch=scratch)
    else:
        path = Path(run)
        named = [path, root / path, partial_of(path)]
        found = [folder for folder in named if folder.suffix == PARTIAL and folder.is_dir()]
        if not found:
            stem = f"{_HEALED.sub('', path.name)}-{HEALED}-"
            found = [folder for folder in partials(root) if folder.name.startswith(stem)]
            found = found or _partials_that_heal(path if path.is_dir() else root / path, root)
    if not found:
        what = "training" if scratch else "finetune"
        raise RunError(
            f"no interrupted {what} {f'of {run}' if run else f'under ./{root}'}",
            "start one without --resume",
        )
    if (found[-1] / FROM_SCRATCH).is_file() != scratch:
        raise RunError(
            f"{found[-1]} is of another command", f"continue it with: {resuming(found[-1])}"
        )
    return found[-1]


def _partials_that_heal(run: Path, root: Path) -> list[Path]:
    """Return the interrupted finetunes of a run, whatever they are called, the latest last."""
    places = {place.resolve(): place for place in (root, run.parent, Path())}
    found = [folder for place in places.values() for folder in partials(place)]
    return sorted((f for f in found if _healed_by(f) == run.resolve()), key=_age)


def _healed_by(partial: Path) -> Path | None:
    """Return the run that an interrupted finetune heals, None where that cannot be read."""
    try:
        return Path(json.loads((partial / HEALS).read_text(encoding="utf-8"))["run"]).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return None


def bare(run: Path) -> str:
    """Return a run's name without the times in it."""
    return _TIMES.sub("", run.resolve().name)


def timed(run: Path) -> str:
    """Return a run's name without the times in it but the last."""
    last = _STAMP.search(run.resolve().name)
    return bare(run) + (last[0] if last else "")


def _free(root: Path, stem: str) -> Path:
    stamp = datetime.now(UTC).astimezone().strftime("%Y%m%d-%H%M%S")
    path, count = root / f"{stem}-{stamp}", 1
    while path.exists() or partial_of(path).exists():
        count += 1
        path = root / f"{stem}-{stamp}-{count}"
    return path


def slug(model: str) -> str:
    """Return the last part of a model's name, safe in a file name on every system."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rstrip("/").split("/")[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _folders(root: Path) -> Iterator[Path]:
    if root.is_dir():
        yield from (path for path in root.iterdir() if path.is_dir() and path.name[0] != ".")


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _known(path: Path, root: Path) -> str:
    names = [run.name for run in finished(root)]
    if not names:
        return "start with: vdcompress apply MODEL --v-dim N"
    return f"{did_you_mean(path.name, names)} (runs are listed under ./{root})"
