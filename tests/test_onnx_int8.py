"""int8 on real text, with a model that has learned something of it."""

from pathlib import Path

import pytest
import torch
from conftest import small_model
from fusion_model.export import OnnxFusionLM, export_model
from onnx_cases import one_thread as one_thread

from fusion_model import FusionLM
from fusion_model.data.batches import Batches
from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document, read_text, split_sentences
from fusion_model.data.tokenizer import train_bpe
from fusion_model.language_model import to_tensors

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
