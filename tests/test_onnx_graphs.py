"""The exported graphs against float64 computations of their own, PyTorch, and one another."""

import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from conftest import small_model
from fusion_model.export.graphs.language import sequence_graph, step_graph
from fusion_model.export.runtime import sequences as sequences_module
from fusion_model.export.verify import check_graph, step_log_probs
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx_cases import EARLY, NO_BOUNDARY, inputs, pytorch_log_probs, sequences, steps
from onnx_cases import one_thread as one_thread
from onnx_oracle import concat_fusion_logits
from oracle import all_logits

from fusion_model import FUSIONS
from fusion_model.errors import ExportError

OPSET = 20


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def chosen(log_probs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("prefix_size", [5, 8], ids=["projected", "same-width"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_is_the_papers(fusion: str, prefix_size: int, layers: int) -> None:
    model = small_model(fusion=fusion, prefix_size=prefix_size, num_layers=layers)
    ids, e = inputs(model, 2, 5)
    read, targets = ids[:, :-1], ids[:, 1:]
    expected = np.stack(
        [
            log_softmax(all_logits(model, read[b].tolist(), None if e is None else e[b]))
            for b in range(2)
        ]
    )
    boundary = np.array([3, 7, 20])
    found, edge, _ = sequences(model, sequence_graph(model, OPSET)).run(read, targets, e, boundary)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, chosen(expected, targets), rtol=0, atol=1e-5)
    of_boundary = np.log(np.exp(expected[..., boundary]).sum(axis=-1))
    np.testing.assert_allclose(edge, of_boundary, rtol=0, atol=1e-5)
    one_by_one = step_log_probs(steps(model, step_graph(model, OPSET)), read, e)
    np.testing.assert_allclose(one_by_one, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 7, 256])
@pytest.mark.parametrize("fusion", ["none", "concat", "input", "gate", "init_both"])
def test_one_graph_serves_every_length_and_batch(fusion: str, length: int, batch: int) -> None:
    model = small_model(fusion=fusion, num_layers=2)
    ids, e = inputs(model, batch, length)
    found, _, _ = sequences(model, sequence_graph(model, OPSET)).run(
        ids[:, :-1], ids[:, 1:], e, NO_BOUNDARY
    )
    expected = chosen(pytorch_log_probs(model, ids[:, :-1], e), ids[:, 1:])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_oracle_graph_of_elementary_nodes_agrees() -> None:
    model = small_model(fusion="concat", scale_prefix=False)
    ids, e = inputs(model, 3, 6)
    weights = {k: v.double().numpy() for k, v in model.state_dict().items()}
    expected = log_softmax(concat_fusion_logits(weights, ids[:, :-1], e))
    graph = sequence_graph(model, OPSET)
    found, _, _ = sequences(model, graph).run(ids[:, :-1], ids[:, 1:], e, NO_BOUNDARY)
    np.testing.assert_allclose(found, chosen(expected, ids[:, 1:]), rtol=0, atol=1e-5)
    zeros = np.zeros((1, 3, 8), np.float32)
    feed = {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "prefix_embeds": e}
    feed |= {"boundary_ids": NO_BOUNDARY, "h0": zeros, "c0": zeros}
    by_onnx = ReferenceEvaluator(graph).run(["target_log_probs"], feed)[0]
    np.testing.assert_allclose(by_onnx, found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fusion", [f for f in FUSIONS if f not in EARLY])
def test_the_state_goes_on_between_runs(fusion: str) -> None:
    model = small_model(fusion=fusion, num_layers=2)
    ids, e = inputs(model, 2, 9)
    run = sequences(model, sequence_graph(model, OPSET)).run
    whole, _, end = run(ids[:, :-1], ids[:, 1:], e, NO_BOUNDARY)
    first, rest = (None, None) if e is None else (e[:, :4], e[:, 4:])
    left, _, state = run(ids[:, :4], ids[:, 1:5], first, NO_BOUNDARY)
    right, _, after = run(ids[:, 4:-1], ids[:, 5:], rest, NO_BOUNDARY, state)
    np.testing.assert_allclose(np.concatenate([left, right], 1), whole, rtol=0, atol=1e-6)
    np.testing.assert_allclose(after, end, rtol=0, atol=1e-6)
    alone, _, _ = run(ids[:, 4:-1], ids[:, 5:], rest, NO_BOUNDARY)
    assert np.abs(alone - right).max() > 1e-4  # the state mattered


@pytest.mark.parametrize("fusion", EARLY)
def test_one_vector_a_sequence_starts_early_fusion_once(fusion: str) -> None:
    model = small_model(fusion=fusion, num_layers=2)
    ids, e = inputs(model, 2, 6)
    assert e is not None
    expected = pytorch_log_probs(model, ids[:, :-1], e[:, 0])
    same = np.repeat(e[:, :1], 6, axis=1)
    runner = steps(model, step_graph(model, OPSET), one_vector=True)
    np.testing.assert_allclose(step_log_probs(runner, ids[:, :-1], same), expected, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_runs_in_pieces_without_a_trace(fusion: str, monkeypatch) -> None:
    """Prefixes of early fusion, and steps of the others; the state is the one at the end."""
    model = small_model(fusion=fusion)
    ids, e = inputs(model, 2, 11)
    runner = sequences(model, sequence_graph(model, OPSET))
    calls, go = [], runner._session.run
    runner._session = SimpleNamespace(run=lambda *given: calls.append(1) or go(*given))
    whole = runner.run(ids[:, :-1], ids[:, 1:], e, np.array([1, 2]))
    monkeypatch.setattr(sequences_module, "ROWS", 3)
    monkeypatch.setattr(sequences_module, "SCORES", 7 * model.config.vocab_size)  # 3 steps of 2
    pieces = runner.run(ids[:, :-1], ids[:, 1:], e, np.array([1, 2]))
    assert len(calls) == 1 + 4
    for found, expected in zip(pieces, whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("build", [sequence_graph, step_graph])
@pytest.mark.parametrize("opset", [20, 21])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_graphs_are_sound_and_int8_is_int8(fusion: str, opset: int, build, tmp_path: Path) -> None:
    model = small_model(fusion=fusion, num_layers=2)
    graph = build(model, opset)
    assert [(i.domain, i.version) for i in graph.opset_import] == [("", opset)]
    onnx.save(graph, tmp_path / "fp32.onnx")
    nodes = check_graph(tmp_path / "fp32.onnx")
    assert nodes["LSTM"] == 2
    onnx.save(build(model, opset, "int8"), tmp_path / "int8.onnx")
    small = check_graph(tmp_path / "int8.onnx")
    assert small["Scan"] == 2
    joined = fusion in (
        "concat",
        "gate",
    )  # two products in place of one; an LSTM's other one is inside its `Scan`
    assert small["MatMulIntegerToFloat"] == nodes["MatMul"] + joined + 2  # and each LSTM one
    assert not {"LSTM", "MatMul"} & set(small)
    weights = onnx.load(tmp_path / "int8.onnx").graph.initializer
    matrices = [w for w in weights if len(w.dims) > 1 and not re.match(r"lstm\d+\.B", w.name)]
    floats = {w.name for w in matrices if w.data_type == TensorProto.FLOAT and w.dims[-2] > 1}
    assert floats == {"embed_tokens.weight"}


@pytest.mark.parametrize("build", [sequence_graph, step_graph])
def test_fp16_keeps_its_weights_and_state_in_half_precision(build) -> None:
    model = small_model(fusion="concat")
    graph = build(model, OPSET, "fp16").graph
    weights = Counter(w.data_type for w in graph.initializer if w.data_type != TensorProto.INT64)
    assert set(weights) == {TensorProto.FLOAT16}
    state = [v.type.tensor_type.elem_type for v in graph.input if v.name in ("h0", "c0")]
    assert state == [TensorProto.FLOAT16] * 2


def test_an_unsound_graph_is_refused(tmp_path: Path) -> None:
    graph = sequence_graph(small_model(fusion="none"), OPSET)
    graph.graph.node[-1].input[0] = "nothing"
    onnx.save(graph, tmp_path / "graph.onnx")
    with pytest.raises(ExportError, match="not sound"):
        check_graph(tmp_path / "graph.onnx")
