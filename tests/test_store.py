"""The store: what goes in comes out, after interruptions too, and damage is refused."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import SENTENCES

from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document
from fusion_model.encoders import load_encoder
from fusion_model.errors import StoreError
from fusion_model.prefixes import embed as embed_module
from fusion_model.prefixes import store as store_module
from fusion_model.prefixes.embed import embed_corpus
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.prefixes.store import EmbeddingStore, MemoryStore, digest

RANDOM = np.random.default_rng(0)
KEYS = [digest(str(i).encode()) for i in range(10)]


def open_store(path: Path, **changes: object) -> EmbeddingStore:
    options = {"fingerprint": "f", "view": "prefix", "dim": 3, "dtype": "float32"} | changes
    return EmbeddingStore(path, **options)


def filled(path: Path) -> np.ndarray:
    vectors = RANDOM.standard_normal((10, 3), np.float32)
    with open_store(path) as store:
        store.append(KEYS[:4], vectors[:4])
        store.append(KEYS[4:], vectors[4:])
    return vectors


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_what_goes_in_comes_out(kind: str, tmp_path: Path) -> None:
    store = open_store(tmp_path / "s") if kind == "disk" else MemoryStore(3)
    vectors = RANDOM.standard_normal((10, 3), np.float32)
    for part in (slice(0, 4), slice(4, 9)):
        store.append(KEYS[part], vectors[part])
    assert [store.row(k) for k in KEYS] == [*range(9), -1]
    rows = np.array([[8, 0], [3, 3]])
    found = store.gather(rows)
    assert found.dtype == np.float32
    assert np.array_equal(found, vectors[rows])


def test_reopened_it_holds_the_same(tmp_path: Path) -> None:
    vectors = filled(tmp_path)
    with open_store(tmp_path, writable=False, dtype=None) as store:
        assert len(store) == 10
        assert np.array_equal(store.gather(np.array([store.row(k) for k in KEYS])), vectors)
        with pytest.raises(StoreError, match="opened for reading"):
            store.append(KEYS, vectors)


def test_float16_is_the_default_and_rounds(tmp_path: Path) -> None:
    with open_store(tmp_path, dtype=None) as store:
        store.append(KEYS[:1], np.full((1, 3), 1 / 3, np.float32))
        assert store.gather(np.array([0])).tolist() == [[np.float16(1 / 3)] * 3]


def test_uncommitted_rows_are_dropped(tmp_path: Path) -> None:
    vectors = filled(tmp_path)
    for name in ("keys.bin", "vectors.bin"):  # as if killed while appending
        with open(tmp_path / name, "ab") as file:
            file.write(b"partial")
    with open_store(tmp_path) as store:
        assert len(store) == 10
        store.append([digest(b"new")], np.ones((1, 3), np.float32))
    with open_store(tmp_path) as store:
        assert store.gather(np.array([10])).tolist() == [[1, 1, 1]]
        assert np.array_equal(store.gather(np.arange(10)), vectors)


@pytest.mark.parametrize("name", ["keys.bin", "vectors.bin"])
@pytest.mark.parametrize("how", ["changed", "shorter", "gone"])
def test_damage_is_refused_by_name(name: str, how: str, tmp_path: Path) -> None:
    filled(tmp_path)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    if how == "changed":
        data[5] ^= 1
        path.write_bytes(data)
    elif how == "shorter":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    for writable in (True, False):
        with pytest.raises(StoreError, match=f"{name} is damaged"):
            open_store(tmp_path, writable=writable)


def test_damaged_manifest_is_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    "change", [{"fingerprint": "g"}, {"view": "sentence"}, {"dim": 4}, {"dtype": "float16"}]
)
def test_another_encoders_store_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    filled(tmp_path)
    [(field, value)] = change.items()
    with pytest.raises(StoreError, match=f"has {field} .* this run needs {value!r}"):
        open_store(tmp_path, **change)


def test_other_folders_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("…")
    with pytest.raises(StoreError, match="holds other files and no store"):
        open_store(tmp_path)
    with pytest.raises(StoreError, match="there is no store at"):
        open_store(tmp_path / "none", writable=False)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with open_store(tmp_path), pytest.raises(StoreError, match="in use by another process"):
        open_store(tmp_path)
    with open_store(tmp_path):
        pass


def test_nan_is_not_stored(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, pytest.raises(StoreError, match="NaN"):
        store.append(KEYS[:1], np.full((1, 3), np.nan, np.float32))


def test_full_disk_keeps_what_is_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = filled(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with open_store(tmp_path) as store:
        monkeypatch.setattr(store_module.os, "fsync", full)
        with pytest.raises(StoreError, match="the disk is full; 10 vectors are kept"):
            store.append([digest(b"new")], np.ones((1, 3), np.float32))
    monkeypatch.undo()
    with open_store(tmp_path) as store:
        assert np.array_equal(store.gather(np.arange(10)), vectors)


def test_interrupted_job_goes_on(
    tmp_path: Path, bpe, bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed_module, "POSITIONS_PER_CHUNK", 10)
    corpus = Corpus.from_documents([Document("a", SENTENCES[:8])], bpe)
    encoder = load_encoder(str(bert_folder), "mean")
    planner = PrefixPlanner(encoder, bpe)
    encoded = []
    original = encoder.encode

    def counting(items):
        if len(encoded) == 3:
            raise KeyboardInterrupt
        encoded.append(len(items))
        return original(items)

    def store() -> EmbeddingStore:
        return open_store(tmp_path, fingerprint=encoder.fingerprint, dim=encoder.dim)

    monkeypatch.setattr(encoder, "encode", counting)
    with store() as first, pytest.raises(KeyboardInterrupt):
        embed_corpus(corpus, planner, first)
    kept = sum(encoded)
    encoded.clear()
    monkeypatch.setattr(
        encoder, "encode", lambda items: (encoded.append(len(items)), original(items))[1]
    )
    with store() as second:
        assert len(second) == kept > 0
        rows = embed_corpus(corpus, planner, second)
        assert sum(encoded) == len(second) - kept
        whole = MemoryStore(encoder.dim)
        expected = whole.gather(embed_corpus(corpus, planner, whole))
        np.testing.assert_allclose(second.gather(rows), expected, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "manifest.json").read_text())["view"] == "prefix"
