"""Fetch a checkpoint's files from the hub, and turn its many errors into one line."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vdcompress.errors import ModelError

OFFLINE_HINT = "give a folder that holds the model, or try again when the hub can be reached"


def fetch(
    identity: str, revision: str | None, patterns: list[str], hint: str = ""
) -> tuple[Path, str | None]:
    """Return the local folder and the commit of a hub model, downloading what is not cached.

    Args:
        identity: hub id, such as ``EleutherAI/pythia-70m``.
        revision: branch, tag or commit.
        patterns: which files.
        hint: what to say if the model is not found, such as a similar name.

    Raises:
        ModelError: if it does not exist, is gated, or the hub cannot be reached.
    """
    try:
        folder = Path(snapshot_download(identity, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(f"{identity} is gated on the hub", "log in: hf auth login") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{identity} has no revision {revision!r} on the hub") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(f"no folder, alias or hub model called {identity!r}", hint) from error
    except Exception as error:  # connection errors differ between versions of the client
        raise ModelError(
            f"the hub cannot be reached and {identity} is not in the local cache",
            hint or OFFLINE_HINT,
        ) from error
    return folder, folder.name if folder.parent.name == "snapshots" else None
