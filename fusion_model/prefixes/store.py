"""Stage 5: vectors by item, on disk or in memory, as numpy arrays.

A store on disk is a folder: `manifest.json` (what the vectors are, and the committed chunks
with their checksums), `keys.bin` (16-byte digests of items) and `vectors.bin` (rows, memory-
mapped). Rows are appended, then committed by replacing the manifest, so an interrupted job
leaves every committed row behind and goes on from there.
"""

import hashlib
import os
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np

from fusion_model.errors import StoreError
from fusion_model.files import locked, why_not_written
from fusion_model.schema import Count, Size, read_json, write_json

FORMAT = 1
KEY_BYTES = 16


class Manifest(TypedDict):
    """What `manifest.json` says."""

    format: int
    fingerprint: str
    view: str
    dim: Size
    policy: NotRequired[str]  # stores made before there were others
    dtype: Literal["float16", "float32"]
    chunks: list[tuple[Count, Count, Count]]  # rows, and the checksum of each file's part


def digest(item: bytes) -> bytes:
    """The key of an item, 16 bytes."""
    return hashlib.blake2b(item, digest_size=KEY_BYTES).digest()


class MemoryStore:
    """Vectors for one use, such as scoring a text."""

    def __init__(self, dim: int) -> None:
        self._rows: dict[bytes, int] = {}
        self._chunks = [np.zeros((0, dim), dtype=np.float32)]

    def row(self, key: bytes) -> int:
        return self._rows.get(key, -1)

    def append(self, keys: Sequence[bytes], vectors: Any) -> None:
        base = len(self._rows)
        self._rows.update((key, base + i) for i, key in enumerate(keys))
        self._chunks.append(np.asarray(vectors, dtype=np.float32))

    def gather(self, rows: np.ndarray) -> np.ndarray:
        if len(self._chunks) > 1:
            self._chunks = [np.concatenate(self._chunks)]
        return self._chunks[0][rows]


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
        policy: str = "every",
        *,
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
        self._writable, self._held = writable, ExitStack()
        if writable:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = locked(self.path / ".lock", f"the store {self.path}", StoreError)
            self._held.enter_context(lock)
        try:
            self._chunks = self._read_manifest()
            self.dtype: np.dtype[Any] = np.dtype(str(self._meta["dtype"]))
            self._widths = {"keys.bin": KEY_BYTES, "vectors.bin": dim * self.dtype.itemsize}
            self._rows = self._read_keys()
        except BaseException:
            self.close()
            raise
        self._vectors: np.ndarray | None = None

    def _read_manifest(self) -> list[list[int]]:
        """The committed chunks: rows, and the checksum of each file's part."""
        path = self.path / "manifest.json"
        if not path.exists():
            if not self._writable:
                raise StoreError(f"there is no store at {self.path}: make one with fusion-lm embed")
            if [p for p in self.path.iterdir() if p.name != ".lock"]:
                raise StoreError(
                    f"{self.path} holds other files and no store: name an empty or new folder"
                )
            self._meta.setdefault("dtype", "float16")
            self._commit([])
            return []
        try:
            manifest = {"policy": "every"} | read_json(path, Manifest)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from None
        self._meta.setdefault("dtype", manifest["dtype"])
        for name, expected in self._meta.items():
            if manifest.get(name) != expected:
                raise StoreError(
                    f"the store {self.path} has {name} {manifest.get(name)!r}, this run needs "
                    f"{expected!r}: name another store, or delete this one"
                )
        chunks: list[list[int]] = manifest["chunks"]
        return chunks

    def _read_keys(self) -> dict[bytes, int]:
        """Row of every key; files are held to their checksums, and uncommitted rows dropped."""
        for column, (name, width) in enumerate(self._widths.items(), start=1):
            path = self.path / name
            if self._chunks:
                try:
                    if path.stat().st_size < len(self) * width:
                        raise _damaged(path, "rows are missing")
                    with open(path, "rb") as file:
                        for chunk in self._chunks:
                            if zlib.crc32(file.read(chunk[0] * width)) != chunk[column]:
                                raise _damaged(path, "a checksum differs")
                except OSError as error:
                    raise _damaged(path, error) from None
            if self._writable:
                with open(path, "ab") as file:
                    file.truncate(len(self) * width)
        data = (self.path / "keys.bin").read_bytes() if self._chunks else b""
        return {data[i * KEY_BYTES : (i + 1) * KEY_BYTES]: i for i in range(len(self))}

    def __len__(self) -> int:
        return sum(chunk[0] for chunk in self._chunks)

    def row(self, key: bytes) -> int:
        return self._rows.get(key, -1)

    def append(self, keys: Sequence[bytes], vectors: Any) -> None:
        """Add rows and commit them.

        Raises:
            StoreError: NaN among the vectors, or the disk is full; nothing is added then.
        """
        if not self._writable:
            raise StoreError(f"the store {self.path} was opened for reading")
        added = np.asarray(vectors)
        if not np.isfinite(added).all():
            raise StoreError("the embeddings hold NaN or infinity: they are not stored")
        data = [b"".join(keys), added.astype(self.dtype).tobytes()]
        committed = len(self)
        try:
            for name, part in zip(self._widths, data, strict=True):
                with open(self.path / name, "ab") as file:
                    file.write(part)
                    file.flush()
                    os.fsync(file.fileno())
            chunks = [*self._chunks, [len(keys), *(zlib.crc32(part) for part in data)]]
            self._commit(chunks)
        except OSError as error:
            for name, width in self._widths.items():
                os.truncate(self.path / name, committed * width)
            raise StoreError(
                f"cannot write the store {self.path}: {why_not_written(error)}; {committed} "
                "vectors are kept, run the same command again to go on"
            ) from error
        self._chunks = chunks
        self._rows.update((key, committed + i) for i, key in enumerate(keys))
        self._vectors = None

    def _commit(self, chunks: list[list[int]]) -> None:
        write_json(self.path / "manifest.json", {**self._meta, "chunks": chunks})

    def gather(self, rows: np.ndarray) -> np.ndarray:
        if self._vectors is None:
            shape = (len(self), self.dim)
            self._vectors = np.memmap(self.path / "vectors.bin", self.dtype, "r", shape=shape)
        return self._vectors[rows].astype(np.float32, copy=False)

    def close(self) -> None:
        """Give up the lock: nothing is added from then on."""
        self._writable = False
        self._held.close()

    def __enter__(self) -> "EmbeddingStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _damaged(path: Path, why: object) -> StoreError:
    return StoreError(f"{path} is damaged ({why}): delete the store to encode anew")
