"""The text every Python installation carries: the standard library's sources and documentation.

One document is one module's source (for ``pydoc_data.topics``: the documentation in it). A fixed
rule on the module's name keeps each module for training, validation or evaluation, so that no text
needs to be shipped and every machine splits it alike. The text itself is that of the running
Python, so figures taken on it are compared within one Python version only.

Left out: tests, third-party packages, the character tables of ``encodings``, modules that are one
table of data, and modules written by the build (they hold paths of the machine).
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from vdcompress.errors import DataError

Role = Literal["training", "validation", "evaluation"]

TRAINING_PERCENT = 86
VALIDATION_PERCENT = 6
MIN_MODULES = 100

_TOPICS = "pydoc_data.topics"
_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "encodings"})
_SKIPPED_MODULES = frozenset({"html.entities", "pydoc_data.module_docs", "_opcode_metadata"})
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")

# A module that was split off another between Python 3.11 and 3.14 shares text with it, and so
# keeps its role.
_SPLIT_FROM = {
    "_ast_unparse": "ast",
    "_py_warnings": "warnings",
    "_pydatetime": "datetime",
    "compression._common._streams": "_compression",
    "pathlib._abc": "pathlib",
    "pathlib._local": "pathlib",
    "pathlib._os": "pathlib",
    "pathlib.types": "pathlib",
}


def role_of(module: str) -> Role:
    """Return what a module's text is kept for, the same on every Python version and machine.

    Args:
        module: dotted name without a final ``__init__``, such as ``"json.decoder"``.

    Returns:
        By the SHA-256 of the name: about 86% of the modules train, 6% validate, 8% evaluate.
        The documentation topics, one large document, always train.
    """
    if module == _TOPICS:
        return "training"
    name = _SPLIT_FROM.get(module, module)
    percent = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    if percent < TRAINING_PERCENT:
        return "training"
    return "validation" if percent < TRAINING_PERCENT + VALIDATION_PERCENT else "evaluation"


def documents(role: Role) -> Iterator[str]:
    """Yield the documents of one role, one a module, sorted by module name.

    Args:
        role: ``"training"``, ``"validation"`` or ``"evaluation"``.

    Returns:
        An iterator of non-empty texts with ``\\n`` line ends; files that are not UTF-8 are skipped.

    Raises:
        DataError: the installation was stripped of its sources (raised at the call).
    """
    sources = _sources(Path(sysconfig.get_path("stdlib")))
    if len(sources) < MIN_MODULES:
        raise DataError(
            f"this Python installation has no standard library sources "
            f"({len(sources)} modules found, {MIN_MODULES} needed)",
            "use a Python with its .py files, or give your own text as --data FILE",
        )
    return _read(sources, role)


def _read(sources: dict[str, Path], role: Role) -> Iterator[str]:
    for module in sorted(sources):
        if role_of(module) == role and (text := _document(module, sources[module])).strip():
            yield text


def _sources(stdlib: Path) -> dict[str, Path]:
    """Map each module kept to its file; folders that are not packages' names are not entered."""
    found: dict[str, Path] = {}
    pending = [stdlib] if stdlib.is_dir() else []
    while pending:
        for path in pending.pop().iterdir():
            if path.is_dir():
                if path.name.isidentifier() and path.name not in _SKIPPED_FOLDERS | {"__pycache__"}:
                    pending.append(path)
            elif path.suffix == ".py" and _is_kept(module := _module_name(path, stdlib)):
                found[module] = path
    return found


def _module_name(path: Path, stdlib: Path) -> str:
    parts = path.relative_to(stdlib).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _is_kept(module: str) -> bool:
    return module not in _SKIPPED_MODULES and not module.startswith(_SKIPPED_PREFIXES)


def _document(module: str, path: Path) -> str:
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
    return _topics(source) if module == _TOPICS else source


def _topics(source: str) -> str:
    """Return the documentation of ``pydoc_data/topics.py``: its texts without the dictionary.

    A topic whose text is a part of another topic's is left out.
    """
    tree = ast.parse(source)
    literals = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    texts = [text for node in literals for text in ast.literal_eval(node).values()]
    longest_first = sorted(set(texts), key=lambda text: (-len(text), text))
    kept: list[str] = []
    for text in longest_first:
        if not any(text.strip() in other for other in kept):
            kept.append(text)
    return "\n".join(sorted(kept))
