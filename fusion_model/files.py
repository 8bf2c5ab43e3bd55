"""Files that are whole or absent, whenever the machine stops."""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from fusion_model.errors import FusionLMError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path for a file or folder that takes the place of `path` once the block is through.

    What a link names is replaced, and the link stays. A device or a pipe is written to.

    Raises:
        OSError: the path is a mount point, which nothing can take the place of.
    """
    path = path.resolve()
    if path.is_mount() and path.is_dir():
        why = "a mount point cannot be replaced, name a folder in it"
        raise OSError(errno.EBUSY, why, str(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    temporary, old = (path.with_name(f".{what}-{path.name}") for what in ("saving", "replaced"))
    _remove(temporary)
    try:
        yield temporary
        _make_readable(temporary)
        if temporary.is_dir() and path.exists():
            _remove(old)
            path.replace(old)
        try:
            temporary.replace(path)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
        _remove(old)
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
        _make_readable(temporary)
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, what: str, kind: type[FusionLMError] = FusionLMError) -> Iterator[None]:
    """Nobody else is in such a block of the same file, which goes with the block.

    Raises:
        FusionLMError: somebody is; of this kind.
        OSError: the folder of the file cannot be written to.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise kind(f"{what} is in use by another process: wait, or choose another") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def check_writable(path: Path) -> None:
    """Raise OSError unless a file can be written there."""
    path = path.resolve()
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.is_file() or not path.exists():
        try:
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:  # it names the temporary one
            raise OSError(error.errno, error.strerror, str(path)) from None


def _make_readable(path: Path) -> None:
    """By whom the user's umask allows: safetensors keeps its files from all others."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~umask)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def why_not_written(error: Exception) -> str:
    """The reason, shortly; a full disk by that name, from safetensors too."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
    return "the disk is full" if full else getattr(error, "strerror", None) or str(error)
