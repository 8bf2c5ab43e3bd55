"""int8: causal, blind to its batch, and close on real text with a model that has learned of it."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import small_model
from fusion_model.export import OnnxFusionLM, export_model
from fusion_model.export.graphs.language import sequence_graph
from onnx_cases import one_thread as one_thread

from fusion_model import FUSIONS, FusionLM
from fusion_model.data.batches import Batches
from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document, read_text, split_sentences
from fusion_model.data.tokenizer import train_bpe
from fusion_model.language_model import to_tensors
from fusion_model.names import EARLY

SHIPPED = Path(__file__).parents[1] / "fusion_model" / "samples" / "thursday.txt"


def trained(sentences: list[str], steps: int = 150) -> FusionLM:
    """An unfused model after some steps of Adam."""
    tokenizer = train_bpe(sentences, 600)
    model = small_model(
        fusion="none", vocab_size=len(tokenizer), embedding_size=48, hidden_size=64, num_layers=2
    ).train()
    source = Batches(Corpus.from_documents([Document("t", sentences)], tokenizer), None, None, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    plan = source.plan(1024, seed=0)
    for step in range(steps):
        batch = source.batch(plan[step % len(plan)])
        log_probs = model.token_log_probs(*to_tensors(batch, model.device))
        optimizer.zero_grad()
        (-log_probs.mean()).backward()
        optimizer.step()
    return FusionLM(model, tokenizer, None)


def costs(sentences: list[str], folder: Path) -> tuple[float, float, float]:
    """Perplexities on real text: untrained vocabulary size, PyTorch, and int8."""
    lm = trained(sentences)
    documents = [Document("t", sentences)]
    export_model(lm, folder, precision="int8")
    exported = OnnxFusionLM(folder, device="cpu", threads=1).perplexity(documents)
    return len(lm.tokenizer), lm.perplexity(documents).perplexity, exported.perplexity


def test_int8_keeps_the_perplexity_of_the_shipped_text(tmp_path: Path) -> None:
    sentences = split_sentences(read_text(SHIPPED))
    uniform, reference, int8 = costs(sentences, tmp_path / "onnx")
    assert reference < uniform / 4  # it has learned
    assert int8 == pytest.approx(reference, rel=0.01)
    assert int8 != pytest.approx(reference, rel=1e-7)  # and it was quantised


@pytest.mark.slow
def test_int8_keeps_the_perplexity_of_a_novel(shared_data: Path, tmp_path: Path) -> None:
    text = read_text(shared_data / "prose" / "carroll-alice.txt")
    uniform, reference, int8 = costs(split_sentences(text), tmp_path / "onnx")
    assert reference < uniform / 4
    assert int8 == pytest.approx(reference, rel=0.01)


PARTS = ("input_ids", "targets", "prefix_embeds")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_no_score_depends_on_later_words_or_on_its_batch(fusion: str, precision: str) -> None:
    """Within 1e-4 bits; later words and batch-mates are such as change a shared scale."""
    model = small_model(fusion=fusion, num_layers=2)
    session = open_graph(sequence_graph(model, 20, precision))
    generator = np.random.default_rng(0)
    batch, length, early = 3, 9, fusion in EARLY
    size = (batch, length, model.config.prefix_size)
    scale = np.where(np.arange(length) < 6, 1, 30)[None, :, None]  # large from position 6 on
    feed = {
        "input_ids": generator.integers(30, size=(batch, length)),
        "targets": generator.integers(30, size=(batch, length)),
        "boundary_ids": np.array([1, 2]),
    }
    if fusion != "none":
        feed["prefix_embeds"] = (generator.normal(size=size) * scale).astype(np.float32)
        feed["prefix_embeds"][0] *= 50
    if not early:
        feed |= {n: np.zeros((2, batch, 8), dtype=np.float32) for n in ("h0", "c0")}

    def scores(rows: slice, end: int) -> np.ndarray:
        own = {n: v[rows, :end] if n in PARTS else v for n, v in feed.items()}
        own |= {n: v[:, rows] for n, v in feed.items() if n in ("h0", "c0")}
        found: np.ndarray = session.run(["target_log_probs"], own)[0]
        return found / np.log(2)

    whole = scores(slice(0, batch), length)
    shorter = scores(slice(0, batch), 6)
    alone = np.concatenate([scores(slice(b, b + 1), length) for b in range(batch)])
    assert np.abs(whole).max() > 1
    np.testing.assert_allclose(shorter, whole[:, :6], rtol=0, atol=1e-4)
    np.testing.assert_allclose(alone, whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_int8_is_near_float32_where_h_and_e_differ_in_size(fusion: str) -> None:
    """e a hundred times as large as h: with one scale for both, h would have no digit left."""
    model = small_model(fusion=fusion)
    graphs = [sequence_graph(model, 20, precision) for precision in ("fp32", "int8")]
    generator = np.random.default_rng(1)
    feed = {
        "input_ids": generator.integers(30, size=(4, 12)),
        "targets": generator.integers(30, size=(4, 12)),
        "boundary_ids": np.array([1]),
    }
    if fusion != "none":
        e = generator.normal(size=(4, 12, model.config.prefix_size)) * 20
        feed["prefix_embeds"] = e.astype(np.float32)
    if fusion not in EARLY:
        feed |= {n: np.zeros((1, 4, 8), dtype=np.float32) for n in ("h0", "c0")}
    exact, found = (open_graph(g).run(None, feed)[0] for g in graphs)
    error = np.abs(found - exact) / np.maximum(1, np.abs(exact))
    assert 0 < error.mean() < 0.02
    assert error.max() < 0.15


def open_graph(graph: onnx.ModelProto) -> ort.InferenceSession:
    return ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
