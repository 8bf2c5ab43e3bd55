"""Stage 5: vectors by item, on disk or in memory.

A store on disk is a folder: `manifest.json` (what the vectors are, and the committed chunks
with their checksums), `keys.bin` (16-byte digests of items) and `vectors.bin` (rows, memory-
mapped). Rows are appended, then committed by replacing the manifest, so an interrupted job
leaves every committed row behind and goes on from there.
"""

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from fusion_model.errors import StoreError
from fusion_model.files import write_text

FORMAT = 1


class MemoryStore:
    """Vectors for one use, such as scoring a text."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._rows: dict[bytes, int] = {}
        self._chunks = [torch.zeros(0, dim)]

    def row(self, key: bytes) -> int:
        return self._rows.get(key, -1)

    def append(self, keys: Sequence[bytes], vectors: Tensor) -> None:
        base = len(self._rows)
        self._rows.update((key, base + i) for i, key in enumerate(keys))
        self._chunks.append(torch.as_tensor(vectors).float())

    def gather(self, rows: np.ndarray) -> Tensor:
        if len(self._chunks) > 1:
            self._chunks = [torch.cat(self._chunks)]
        return self._chunks[0][torch.from_numpy(rows)]


class EmbeddingStore:
    """Vectors on disk for one encoder, pooling, precision, view and policy.

    Args:
        path: folder, made if missing.
        fingerprint: `Encoder.fingerprint`.
        view: one of `fusion_model.prefixes.views.VIEWS`.
        dim: width of the vectors.
        policy: one of `fusion_model.encoders.policies.POLICIES`.
        dtype: `float16` or `float32` on disk (default: what is there, else `float16`).
        writable: take the store's lock and allow `append`.

    Raises:
        StoreError: damaged, of another encoder or view, in use by another process, or no
            store at all where one must be read.
    """

    def __init__(
        self,
        path: Path | str,
        fingerprint: str,
        view: str,
        dim: int,
        *,
        policy: str = "every",
        dtype: str | None = None,
        writable: bool = True,
    ) -> None:
        if dtype is not None and dtype not in ("float16", "float32"):
            raise StoreError(f"unknown store dtype {dtype!r}: choose float16 or float32")
        self.path, self.dim = Path(path), dim
        self._meta: dict[str, Any] = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "view": view,
            "dim": dim,
            "policy": policy,
        }
        if dtype is not None:
            self._meta["dtype"] = dtype
        self._lock: FileLock | None = None
        if writable:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / ".lock", timeout=0)
            try:
                self._lock.acquire()
            except Timeout:
                raise StoreError(f"the store {self.path} is in use by another process") from None
        try:
            self._chunks = self._read_manifest(writable)
            self.dtype: np.dtype[Any] = np.dtype(str(self._meta["dtype"]))
            self._check_files()
        except BaseException:
            self.close()
            raise
        self._vectors: Tensor | None = None

    def _read_manifest(self, writable: bool) -> list[list[int]]:
        path = self.path / "manifest.json"
        if not path.exists():
            others = [] if not self.path.is_dir() else [p for p in self.path.iterdir()]
            if not writable:
                raise StoreError(f"there is no store at {self.path}: make one with fusion-lm embed")
            if [p for p in others if p.name != ".lock"]:
                raise StoreError(
                    f"{self.path} holds other files and no store: name an empty or new folder"
                )
            self._meta.setdefault("dtype", "float16")
            self._commit([])
            return []
        try:
            manifest: dict[str, Any] = json.loads(path.read_text())
            chunks: list[list[int]] = manifest["chunks"]
            manifest.setdefault("policy", "every")  # stores made before there were others
            self._meta.setdefault("dtype", str(np.dtype(manifest["dtype"])))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path} is damaged ({error}): delete the store to encode anew"
            ) from None
        for name, expected in self._meta.items():
            if manifest.get(name) != expected:
                raise StoreError(
                    f"the store {self.path} has {name} {manifest.get(name)!r}, this run needs "
                    f"{expected!r}: name another store"
                )
        return chunks

    def _check_files(self) -> None:
        sizes = {"keys.bin": KEY_BYTES, "vectors.bin": self.dim * self.dtype.itemsize}
        for column, (name, width) in enumerate(sizes.items(), start=1):
            path = self.path / name
            if not self._chunks and self._lock is None:
                continue
            if not path.exists() and not self._chunks:
                path.touch()
            size = path.stat().st_size if path.exists() else 0
            if size < len(self) * width:
                raise StoreError(
                    f"{path} is damaged: {size} bytes, {len(self) * width} expected; delete the "
                    "store to encode anew"
                )
            with open(path, "rb") as file:
                for chunk in self._chunks:
                    if zlib.crc32(file.read(chunk[0] * width)) != chunk[column]:
                        raise StoreError(
                            f"{path} is damaged: a checksum differs; delete the store to encode "
                            "anew"
                        )
            if self._lock is not None and size > len(self) * width:
                os.truncate(path, len(self) * width)  # what an interrupted job left uncommitted
        data = (self.path / "keys.bin").read_bytes() if self._chunks else b""
        self._rows = {data[i * KEY_BYTES : (i + 1) * KEY_BYTES]: i for i in range(len(self))}

    def __len__(self) -> int:
        return sum(chunk[0] for chunk in self._chunks)

    def row(self, key: bytes) -> int:
        return self._rows.get(key, -1)

    def append(self, keys: Sequence[bytes], vectors: Tensor) -> None:
        """Add rows and commit them.

        Raises:
            StoreError: NaN among the vectors, or the disk is full; nothing is added then.
        """
        if self._lock is None:
            raise StoreError(f"the store {self.path} was opened for reading")
        vectors = torch.as_tensor(vectors)
        if not bool(torch.isfinite(vectors).all()):
            raise StoreError("the embeddings hold NaN or infinity: they are not stored")
        data = [b"".join(keys), vectors.numpy().astype(self.dtype).tobytes()]
        committed = len(self)
        widths = (KEY_BYTES, self.dim * self.dtype.itemsize)
        names = ("keys.bin", "vectors.bin")
        try:
            for name, part in zip(names, data, strict=True):
                with open(self.path / name, "ab") as file:
                    file.write(part)
                    file.flush()
                    os.fsync(file.fileno())
            chunks = [*self._chunks, [len(keys), *(zlib.crc32(part) for part in data)]]
            self._commit(chunks)
        except OSError as error:
            for name, width in zip(names, widths, strict=True):
                os.truncate(self.path / name, committed * width)
            why = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise StoreError(
                f"cannot write the store {self.path}: {why}; {committed} vectors are kept, run "
                "the same command again to go on"
            ) from error
        self._chunks = chunks
        self._rows.update((key, committed + i) for i, key in enumerate(keys))
        self._vectors = None

    def _commit(self, chunks: list[list[int]]) -> None:
        write_text(self.path / "manifest.json", json.dumps({**self._meta, "chunks": chunks}))

    def gather(self, rows: np.ndarray) -> Tensor:
        if self._vectors is None:
            shape = (len(self), self.dim)
            # Copy on write: PyTorch warns of memory that it must not write to.
            mapped = np.memmap(self.path / "vectors.bin", self.dtype, mode="c", shape=shape)
            self._vectors = torch.from_numpy(mapped)
        return self._vectors[torch.from_numpy(rows)].float()

    def close(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "EmbeddingStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


KEY_BYTES = 16


def digest(item: bytes) -> bytes:
    """The key of an item, 16 bytes."""
    return hashlib.blake2b(item, digest_size=KEY_BYTES).digest()
