"""Every file that this project writes, damaged in every way: it loads equal or is refused by name.

Bytes are flipped, cut, put in and written over; in JSON, fields go or say something else.
"""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES, small_model
from fusion_model.benchmarks.measure import records
from fusion_model.export import OnnxFusionLM, export_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_cases import one_thread as one_thread
from onnx_cases import saved_model
from test_experiments import TOY

from fusion_model.encoders.controls import BagEncoder
from fusion_model.errors import FusionLMError
from fusion_model.experiments.arms import Arm
from fusion_model.experiments.corpora import Texts
from fusion_model.experiments.study import Study
from fusion_model.loading import load_model
from fusion_model.prefixes.store import EmbeddingStore, digest
from fusion_model.schema import read_lines
from fusion_model.training.checkpoint import load_checkpoint
from fusion_model.training.claim import claim_folder
from fusion_model.training.options import TrainingOptions
from fusion_model.training.run import Epoch

SEALED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
# Of these a changed value cannot be told from a measured one; they load or are refused.
UNSEALED = ("metrics.jsonl", "bench.jsonl", *(f"unsealed/{name}" for name in SEALED))
EXAMPLES, SLOWLY = 12, 300
counts: Counter[str] = Counter()


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, is_json: bool) -> bytes:
    """A file's content, changed."""
    kinds = ["flip", "cut", "insert", "overwrite", *(["drop", "replace"] * 2 if is_json else [])]
    kind = draw(st.sampled_from(kinds))
    at = draw(st.integers(0, len(whole) - 1))
    if kind == "cut":
        return whole[:at]
    if kind == "flip":
        return whole[:at] + bytes([whole[at] ^ 1 << draw(st.integers(0, 7))]) + whole[at + 1 :]
    if kind in ("insert", "overwrite"):
        some = draw(st.binary(min_size=1, max_size=9))
        return whole[:at] + some + whole[at + len(some) * (kind == "overwrite") :]
    contents = json.loads(whole)
    holders = [h for h in _holders(contents) if h]
    holder = holders[draw(st.integers(0, min(len(holders), 200) - 1))]
    key = draw(st.sampled_from(sorted(holder)[:200] if isinstance(holder, dict) else [0]))
    if kind == "drop":
        del holder[key]
    else:
        others = [None, True, 0, -1, 10**9, 1.5, "", "x", [], {}, [[1]], {"a": 1}]
        holder[key] = draw(st.sampled_from(others))
    return json.dumps(contents).encode()


def _holders(value: Any) -> Iterator[Any]:
    """The objects and lists of JSON, outermost first."""
    if isinstance(value, dict | list):
        yield value
        for inner in value.values() if isinstance(value, dict) else value[:3]:
            yield from _holders(inner)


def of_model(folder: Path) -> Any:
    model, tokenizer = load_model(str(folder))
    weights = {k: v.numpy().tobytes() for k, v in model.state_dict().items()}
    facts = [getattr(model.config, n) for n in ("fusion", "pooling", "view", "policy", "shuffle")]
    return weights, facts, tokenizer(SENTENCES)["input_ids"]


def of_store(folder: Path) -> Any:
    with EmbeddingStore(folder, "f", "prefix", 3, writable=False) as store:
        keys = [digest(str(i).encode()) for i in range(8)]
        rows = [store.row(key) for key in keys]
        return len(store), rows, store.gather(np.arange(len(store))).tobytes()


def of_checkpoint(out: Path) -> Any:
    model = small_model(fusion="none")
    optimizer = torch.optim.Adam(model.parameters())
    state = load_checkpoint(out, model, optimizer)
    moments = [v.tolist() for p in optimizer.state.values() for v in p.values()]
    return state, [p.tolist() for p in model.parameters()], moments


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory, trained: Path, bpe, bert_folder: Path
) -> dict[str, tuple[Path, Callable[[], Any]]]:
    """Every kind of file: where it lies, and what is read of it."""
    root = tmp_path_factory.mktemp("fuzz")
    found: dict[str, tuple[Path, Callable[[], Any]]] = {}

    def add(folder: Path, load: Callable[[], Any], prefix: str, names: list[str]) -> None:
        found.update({f"{prefix}/{name}": (folder / name, load) for name in names})

    model = root / "model"
    shutil.copytree(trained / "none", model)
    add(model, lambda: of_model(model), "model", [*SEALED, "sha256.json"])
    unsealed = root / "unsealed"
    shutil.copytree(trained / "none", unsealed)
    (unsealed / "sha256.json").unlink()
    add(unsealed, lambda: of_model(unsealed), "unsealed", list(SEALED))
    names = {f.name for f in dataclasses.fields(TrainingOptions)}
    settings_ = json.loads((model / "training.json").read_text())
    settings_ = {k: tuple(v) if isinstance(v, list) else v for k, v in settings_.items()}
    options = TrainingOptions(**{k: v for k, v in settings_.items() if k in names})
    found["training.json"] = model / "training.json", lambda: claim_folder(options, model, False)
    metrics = model / "metrics.jsonl"
    found["metrics.jsonl"] = metrics, lambda: read_lines(metrics, Epoch)

    run = root / "run"
    from fusion_model.training.checkpoint import TrainState, save_checkpoint

    network = small_model(fusion="none")
    optimizer = torch.optim.Adam(network.parameters())
    network(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    save_checkpoint(run, network, optimizer, TrainState(step=7))
    parts = ["state.json", "model.safetensors", "optimizer.safetensors"]
    add(run / "checkpoint-00000007", lambda: of_checkpoint(run), "checkpoint", parts)

    store = root / "store"
    with EmbeddingStore(store, "f", "prefix", 3) as filled:
        for i in range(0, 8, 4):
            vectors = np.random.default_rng(i).standard_normal((4, 3))
            filled.append([digest(str(j).encode()) for j in range(i, i + 4)], vectors)
    parts = ["manifest.json", "keys.bin", "vectors.bin"]
    add(store, lambda: of_store(store), "store", parts)

    bag = root / "bag"
    bag.mkdir()
    BagEncoder.fit("tfidf", SENTENCES, dim=12).save(bag)
    found["tfidf.json"] = bag / "tfidf.json", lambda: BagEncoder.load("tfidf", bag).content_sha256

    study = Study(
        TOY,
        Texts("made", root / "a", root / "a", root / "b", {}),
        root,
        "minilm",
        1,
        root / "results",
    )
    arm = Arm("trigram", {"fusion": "none"}, "trigram")
    finished = study.run(arm, {}, 0)
    finished.result["losses"] = {"b": {"nats": [70.25, 8.5], "tokens": [14, 3], "words": [9, 2]}}
    study._keep(finished)
    found["run.json"] = finished.path, lambda: study.run(arm, {}, 0).result

    exported = root / "onnx"
    export_model(
        str(saved_model(root / "m", bpe, bert_folder, fusion="concat")), exported, encoder=True
    )
    parts = [p.name for p in exported.iterdir() if p.suffix in (".onnx", ".bin")]
    add(
        exported,
        lambda: OnnxFusionLM(exported, threads=1).manifest,
        "export",
        sorted([*parts, "manifest.json", "tokenizer.json", "encoder_tokenizer.json"]),
    )

    bench = root / "bench.jsonl"
    lines = [{"kind": "run", "run": "a"}, {"kind": "skip", "run": "a", "reason": "x"}]
    bench.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found["bench.jsonl"] = bench, lambda: records.read(bench)
    return found


NAMES = (
    *(f"model/{name}" for name in (*SEALED, "sha256.json")),
    *(f"unsealed/{name}" for name in SEALED),
    *("training.json", "metrics.jsonl"),
    *(f"checkpoint/{n}" for n in ("state.json", "model.safetensors", "optimizer.safetensors")),
    *(f"store/{name}" for name in ("manifest.json", "keys.bin", "vectors.bin")),
    *("tfidf.json", "run.json", "bench.jsonl"),
    *(f"export/{n}" for n in ("encoder.onnx", "encoder_tokenizer.json", "encoder_weights.bin")),
    *(f"export/{n}" for n in ("manifest.json", "model.onnx", "step.onnx", "tokenizer.json")),
    "export/weights.bin",
)


def fuzz(name: str, path: Path, load: Callable[[], Any], examples: int) -> None:
    whole, expected = path.read_bytes(), load()
    is_json = path.suffix == ".json"

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(whole, is_json))
    def one(content: bytes) -> None:
        path.write_bytes(content)
        refused, found = "", None
        try:
            found = load()
        except FusionLMError as error:
            refused = str(error)
        assert "\n" not in refused
        assert refused or name in UNSEALED or found == expected
        counts["refused" if refused else "loaded"] += 1

    try:
        one()
    finally:
        path.write_bytes(whole)
    assert load() == expected


def test_all_kinds_are_here(files) -> None:
    assert set(files) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_loads_equal_or_is_refused(name: str, files) -> None:
    fuzz(name, *files[name], EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_at_length(name: str, files) -> None:
    before = counts.copy()
    fuzz(name, *files[name], SLOWLY)
    print(f"{name}: {dict(counts - before)}")
