"""Files that are whole or absent, whenever the machine stops."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path for a file or folder that takes the place of `path` once the block is through.

    What a link names is replaced, and the link stays. A device or a pipe is written to.
    """
    path = path.resolve()
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    temporary = path.with_name("saving-" + path.name)
    _remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            _remove(path)
        temporary.replace(path)
    finally:
        _remove(temporary)


@contextmanager
def replace_files(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files replace those of `folder` once the block is through."""
    temporary = folder / "saving.tmp"
    _remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that has one in JSON a line; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def why_not_written(error: Exception) -> str:
    """The reason, shortly; a full disk by that name, from safetensors too."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
    return "the disk is full" if full else getattr(error, "strerror", None) or str(error)
