"""The exported encoder over trees: every policy, whole and as texts grow, against PyTorch's; int8
that no later word moves; and the whole chain, from text to surprisal and to text."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ARCHITECTURES, SENTENCES
from fusion_model.export import OnnxFusionLM, export_model
from fusion_model.export import exporter as exporter_module
from fusion_model.export.graphs.language import sequence_graph
from fusion_model.export.graphs.weights import save_graphs
from fusion_model.export.runtime.model import open_encoder
from onnx_cases import inputs, pytorch_log_probs, saved_model, sequences
from onnx_cases import one_thread as one_thread

import fusion_model
from fusion_model import FusionLMConfig, FusionLMForCausalLM
from fusion_model.encoders import load_encoder
from fusion_model.errors import ExportError
from fusion_model.prefixes.planner import PrefixPlanner

POOLING = "static+last@1+mean@1"


def exported(folder: Path, pooling: str, policy: str, out: Path, precision: str = "fp32"):
    """The encoder in PyTorch, and exported."""
    encoder = load_encoder(str(folder), pooling, policy=policy)
    described = exporter_module._write_encoder(encoder, out, precision, 20)
    return encoder, open_encoder(out, {"encoder": described, "model": {}}, "cpu", 1)


def all_inputs(encoder, tokenizer, sentences=SENTENCES[:4]) -> list:
    ids = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in sentences]
    return PrefixPlanner(encoder, tokenizer).inputs(ids, [[], *ids[:-1]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("policy", ["incremental", "incremental+refresh:3"])
def test_a_pass_and_a_stream_are_pytorchs(
    architecture: str, policy: str, encoder_folders, bpe, tmp_path: Path
) -> None:
    pooling = "cls+mean@1+last+sep+mask+static" + "+pooler" * (architecture == "bert")
    ours, theirs = exported(encoder_folders[architecture], pooling, policy, tmp_path)
    given = all_inputs(ours, bpe)
    assert all_inputs(theirs, bpe) == given
    expected = np.asarray(ours.encode(given))
    np.testing.assert_allclose(theirs.encode(given), expected, rtol=0, atol=2e-5)
    stream = theirs.stream()
    for at in range(0, len(given), 3):  # texts that fork, and several at once
        some = given[at : at + 3]
        np.testing.assert_allclose(stream.encode(some), expected[at : at + 3], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("pooling", "asking"), [(POOLING, 0), ("cls+mean", 1)])
def test_only_nodes_that_are_read_are_computed(
    pooling: str, asking: int, bert_folder: Path, bpe, tmp_path: Path
) -> None:
    """A node a token, the head's, and one a text for a pooling that asks by a node of its own."""
    ours, theirs = exported(bert_folder, pooling, "incremental", tmp_path)
    given = all_inputs(ours, bpe, SENTENCES[:1])
    fed = []
    feed = theirs._feed
    theirs._feed = lambda trees, flats, *past: (
        fed.append((trees, flats)) or feed(trees, flats, *past)
    )
    theirs.encode(given)
    [([tree], [flat])] = fed
    texts = sum(end >= 0 for end in tree.ends)
    assert len(flat.tokens) == len(tree) + asking * texts


@pytest.mark.parametrize("policy", ["every", "word", "stride:2", "sentence"])
def test_exact_policies_take_the_same_graph(
    policy: str, bert_folder: Path, bpe, tmp_path: Path
) -> None:
    ours, theirs = exported(bert_folder, "static+mean+cls+sep+pooler", policy, tmp_path)
    given = all_inputs(ours, bpe)
    assert all_inputs(theirs, bpe) == given
    assert not hasattr(theirs, "stream")
    expected = np.asarray(ours.encode(given))
    np.testing.assert_allclose(theirs.encode(given), expected, rtol=0, atol=2e-5)
    graph = onnx.load(tmp_path / "encoder.onnx")
    assert "`seen_positions`" in graph.doc_string
    assert {p.key: p.value for p in graph.metadata_props}["policy"] == policy
    nodes = [n.op_type for n in graph.graph.node]
    assert nodes.count("MultiHeadAttention") == 2  # one node a layer
    assert "Softmax" not in nodes


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_later_words_and_neighbours_move_no_vector(
    precision: str, bert_folder: Path, bpe, tmp_path: Path
) -> None:
    _, encoder = exported(bert_folder, POOLING, "incremental", tmp_path, precision)
    short = all_inputs(encoder, bpe, ["The cat sat"])
    longer = all_inputs(encoder, bpe, ["The cat sat on the mat, 7 x q!"])[: len(short)]
    assert longer[:-1] == short[:-1]
    alone = encoder.encode(short[:-1])
    beside = encoder.encode([*all_inputs(encoder, bpe, SENTENCES[3:6]), *longer[:-1]])
    np.testing.assert_allclose(beside[-len(alone) :], alone, rtol=0, atol=1e-6)


def test_the_whole_chain_runs_incrementally(bert_folder: Path, bpe, tmp_path: Path) -> None:
    """Scores and greedy text as PyTorch's; int8 near it."""
    options = {"fusion": "concat", "pooling": POOLING, "policy": "incremental"}
    folder = saved_model(tmp_path, bpe, bert_folder, **options)
    lm = fusion_model.load(str(folder))
    text = " ".join(SENTENCES[:6])
    expected = lm.score(text)
    for precision, limit in (("fp32", 1e-4), ("int8", 0.5)):
        out = tmp_path / precision
        manifest = export_model(str(folder), out, encoder=True, precision=precision)
        assert manifest["encoder"]["precision"] == precision
        export = OnnxFusionLM(out, device="cpu", threads=1)
        found = export.score(text)
        assert [w.text for w in found] == [w.text for w in expected]
        assert max(abs(a.bits - b.bits) for a, b in zip(found, expected, strict=True)) < limit
        if precision == "fp32":
            options = {"max_new_tokens": 12, "num_return_sequences": 1}
            assert export.generate("The cat", **options) == lm.generate("The cat", **options)
            beams = {"max_new_tokens": 6, "num_beams": 3}
            assert export.generate("She", **beams) == lm.generate("She", **beams)
    longer = OnnxFusionLM(tmp_path / "int8", device="cpu", threads=1)
    before = longer.score("The cat sat on")[:3]
    after = longer.score("The cat sat on the dog, 9 x q.")[:3]
    assert max(abs(a.bits - b.bits) for a, b in zip(before, after, strict=True)) < 1e-4


def test_an_activation_without_an_operator_is_said(
    bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter_module, "incremental_graph", lambda *_: None)
    with pytest.raises(ExportError, match="activation that no ONNX operator"):
        exported(bert_folder, POOLING, "incremental", tmp_path)


def test_weights_are_kept_once(tmp_path: Path) -> None:
    """Of both graphs, and of tied ones; only they grow with the model."""
    sizes = {}
    for tied in (False, True):
        config = FusionLMConfig(
            vocab_size=900, embedding_size=64, hidden_size=32, fusion="none", tie_weights=tied
        )
        model = FusionLMForCausalLM(config).eval()
        parts = {name: sequence_graph(model, 20) for name in ("a.onnx", "b.onnx")}
        save_graphs({tmp_path / n: g for n, g in parts.items()}, tmp_path / "w.bin")
        sizes[tied] = (tmp_path / "w.bin").stat().st_size
        assert all((tmp_path / n).stat().st_size < 20_000 for n in parts)
        onnx.checker.check_model(str(tmp_path / "b.onnx"), full_check=True)
        ids, e = inputs(model, 2, 5)
        runner = sequences(model, tmp_path / "b.onnx")
        found, _, _ = runner.run(ids[:, :-1], ids[:, 1:], e, np.zeros(1, dtype=np.int64))
        exact = pytorch_log_probs(model, ids[:, :-1], e)
        wanted = np.take_along_axis(exact, ids[:, 1:, None], axis=2)[..., 0]
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    matrix = 4 * 900 * 64
    assert sizes[False] - sizes[True] == pytest.approx(matrix, abs=4096)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_model_beyond_two_gigabytes(precision: str, tmp_path: Path) -> None:
    size = {"vocab_size": 300_000, "embedding_size": 1000, "hidden_size": 16}
    with torch.device("meta"):
        model = FusionLMForCausalLM(FusionLMConfig(fusion="none", tie_weights=False, **size))
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.lm_head.weight.fill_(1.0)  # or its bytes would be the table's, and kept once
    graph = sequence_graph(model, 20, precision)
    save_graphs({tmp_path / "model.onnx": graph}, tmp_path / "weights.bin")
    del graph
    least = 2**31 if precision == "fp32" else 1.4e9
    assert (tmp_path / "weights.bin").stat().st_size > least
    exporter_module.check_graph(tmp_path / "model.onnx")
    runner = sequences(model, tmp_path / "model.onnx")
    ids = np.array([[5, 6, 7]])
    found, _, _ = runner.run(ids, ids, None, np.zeros(1, dtype=np.int64))
    np.testing.assert_allclose(found, -np.log(300_000), rtol=1e-5)
