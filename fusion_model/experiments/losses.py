"""What a model is measured by: losses by document, bits of words, how e moves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusion_model.data.batches import Batches
from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document, read_documents
from fusion_model.language_model import FusionLM
from fusion_model.training.options import TrainingOptions


def read_test(
    path: Path, tokenizer: Any, options: TrainingOptions
) -> tuple[list[Document], Corpus]:
    """Documents of a test text, and their sentences as a model reads them."""
    documents = read_documents([str(path)], "lines")
    return documents, Corpus.from_documents(documents, tokenizer, options.max_tokens)


def by_document(
    documents: Sequence[Document], corpus: Corpus, nats: Sequence[np.ndarray]
) -> dict[str, list[float]]:
    """Sums over the documents of a corpus: nats, tokens, words.

    Args:
        nats: of the tokens of each sentence.
    """
    document = np.cumsum(corpus.starts_document) - 1
    sums = np.bincount(document, [n.sum(dtype=np.float64) for n in nats])
    tokens = np.bincount(document, [len(n) for n in nats])
    words = [sum(len(s.split()) for s in d.sentences) for d in documents]
    return {"nats": np.round(sums, 3).tolist(), "tokens": tokens.tolist(), "words": words}


def successive_cosine(batches: Batches) -> float | None:
    """Mean cosine of e at positions of a sentence that follow each other; None without any e."""
    sums = np.zeros(2)
    for indices in batches.plan(8192):
        _, e, lengths = batches.batch(indices)
        if e is None:
            return None
        unit = e / np.maximum(np.linalg.norm(e, axis=-1, keepdims=True), 1e-12)
        for row, n in zip(unit, lengths, strict=True):
            sums += (row[: n - 2] * row[1 : n - 1]).sum(), n - 2
    return round(float(sums[0] / max(sums[1], 1)), 4)


def word_bits(lm: FusionLM, documents: Sequence[Document]) -> np.ndarray:
    """Surprisal in bits of every word, sentence ends left out, each sentence on its own, [M]."""
    lengths = {
        (d.name, i): len(s.split()) for d in documents for i, s in enumerate(d.sentences, start=1)
    }
    scores = lm.score(documents)
    return np.array([w.bits for w in scores if w.word <= lengths[w.document, w.sentence]])
