"""A sweep's folder: what it was made with, and one file for each row that ended.

Every file is written beside its place and renamed, so what stands there is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdcompress import runs
from vdcompress.artifact import require_free
from vdcompress.atomic import write
from vdcompress.errors import RunError

ROOT = Path("sweeps")
SETTINGS = "settings.json"
ROWS = "rows"
DOCUMENT = "sweep.json"
PLOT = "sweep.png"
FORMAT = 1
PROBE = 1 << 20
FIELDS = {"kind", "state", "settings", "kv_cache", "perplexity"}

Json = dict[str, Any]


@dataclass(frozen=True)
class SweepFolder:
    """Where a sweep keeps its rows.

    Attributes:
        path: the folder; it need not exist yet.
        settings: everything that all rows have in common, as plain values.
    """

    path: Path
    settings: Json

    @classmethod
    def default(cls, settings: Json, root: Path = ROOT) -> SweepFolder:
        """Return the folder that belongs to these settings: the same ones find it again."""
        model = runs.slug(str(settings["model"]["id"]))
        return cls(root / f"{model}-{_digest(settings)[:8]}", settings)

    @property
    def document(self) -> Path:
        """The finished sweep."""
        return self.path / DOCUMENT

    @property
    def plot(self) -> Path:
        """Its picture."""
        return self.path / PLOT

    def require_usable(self, text: str | None = None) -> None:
        """Refuse a folder that something else is in.

        Args:
            text: digest of the tokens that calibrate and measure, where it is known.

        Raises:
            RunError: it is a sweep with other settings, or no sweep at all.
        """
        if not (self.path / SETTINGS).is_file():
            if (self.path / runs.MARKER).is_file():
                raise RunError(f"{self.path} holds a run", "name another folder with -o")
            require_free(self.path, force=False)
            return
        try:
            found = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
            made, made_text = found["settings"], found["text"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{self.path / SETTINGS} cannot be read", "name another folder with -o"
            ) from error
        if (differs := _difference(made, self.settings)) is not None:
            raise RunError(
                f"{self.path} holds a sweep with another {differs}", "name another folder with -o"
            )
        if text is not None and text != made_text:
            raise RunError(
                f"{self.path} holds a sweep over other text: the files have changed since",
                "name another folder with -o",
            )

    def begin(self, text: str) -> None:
        """Write down the settings; whatever was finished before is not any more.

        Args:
            text: digest of the tokens that calibrate and measure.

        Raises:
            RunError: as :meth:`require_usable`.
            ArtifactError: it cannot be written.
        """
        self.require_usable(text)
        body = {"format": FORMAT, "settings": self.settings, "text": text}
        write(self.path / SETTINGS, _dumps(body))
        for path in (self.document, self.plot):
            path.unlink(missing_ok=True)

    def read(self, name: str, settings: Mapping[str, Any]) -> Json | None:
        """Return a row that was measured with these settings, None if it must be measured.

        Raises:
            RowError: something is there that is no row.
        """
        path = self._row(name)
        if not path.exists():
            return None
        row = _row_in(path)
        done = row["state"] == "done" and row["settings"] == dict(settings)
        return row if done else None

    def others(self, names: set[str]) -> list[Json]:
        """Return the rows of earlier calls, measured or failed, but not those named."""
        found = []
        for path in sorted((self.path / ROWS).glob("*.json")):
            with suppress(RowError):
                found.append(_row_in(path))
        return [row for row in found if row["row"] not in names and row["state"] != "impossible"]

    def finished(self) -> int:
        """Count the rows that are measured."""
        return sum(row["state"] == "done" for row in self.others(set()))

    def save(self, row: Json) -> None:
        """Write one row.

        Raises:
            ArtifactError: it cannot be written; nothing is left that looks like a row.
        """
        write(self._row(row["row"]), _dumps(row))

    def _row(self, name: str) -> Path:
        return self.path / ROWS / f"{name}.json"


class RowError(ValueError):
    """A file that is no row."""


def weights_digest(folder: Path) -> str:
    """Return a digest of a checkpoint: names, sizes and both ends of its files, not all of it."""
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("*.safetensors")), folder / "config.json"]:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(PROBE))
            file.seek(max(0, size - PROBE))
            digest.update(file.read(PROBE))
    return digest.hexdigest()


def _row_in(path: Path) -> Json:
    """Read a row's file.

    Raises:
        RowError: it is damaged, or of another name.
    """
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RowError(f"{path} cannot be read") from error
    if not isinstance(row, dict) or row.get("row") != path.stem or not set(row) >= FIELDS:
        raise RowError(f"{path} is not a row")
    if row["state"] == "done" and not (row["kv_cache"] and row["perplexity"]):
        raise RowError(f"{path} lacks figures")
    return row


def _difference(made: Any, wanted: Mapping[str, Any]) -> str | None:
    """Return the name of the first setting that differs, with both values; None if none does."""
    old, new = _flat(made), _flat(wanted)
    for name in [*new, *old]:
        if old.get(name) != new.get(name):
            return f"{name} ({old.get(name)}, not {new.get(name)})"
    return None


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their names in one piece, such as ``calibration.data``."""
    if not isinstance(settings, Mapping):
        return {prefix.rstrip("."): settings}
    return {
        name: value
        for key, part in settings.items()
        for name, value in _flat(part, f"{prefix}{key}.").items()
    }


def _dumps(body: Json) -> bytes:
    return (json.dumps(body, indent=1) + "\n").encode()


def _digest(body: Json) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
