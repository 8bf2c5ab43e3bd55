"""The audit: a word is appended, and nothing before it moves; nor by what is scored beside it.

From text to surprisal, by an export alone, at every precision, with the exact and the incremental
encoder, sentence by sentence and through an article.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import SENTENCES
from fusion_model.export import OnnxFusionLM, export_model
from fusion_model.export import exporter as exporter_module
from fusion_model.export import verify as verify_module
from fusion_model.export.manifest import PRECISIONS
from onnx_cases import one_thread as one_thread
from onnx_cases import saved_model

from fusion_model.data.text import Document

LIMIT = 1e-4  # bits
# All of the vocabulary: a space that is a token of its own counts with the word before it.
TEXT = "The cat sat on the mat and she said that the dog sat on the floor"
WORDS = TEXT.split()


def bits(lm: OnnxFusionLM, sentences: Sequence[Sequence[str]], context: str) -> list[np.ndarray]:
    """Of every word of each sentence, without the sentence's end."""
    documents = [Document("audited", [" ".join(words) for words in sentences])]
    found = lm.score(documents, context=context)
    rows = [[w.bits for w in found if w.sentence == i] for i in sorted({w.sentence for w in found})]
    assert [len(row) for row in rows] == [len(words) + 1 for words in sentences]
    return [np.array(row[:-1]) for row in rows]


def moved(lm: OnnxFusionLM, words: Sequence[str], context: str) -> tuple[float, float]:
    """How many bits a word moves at most: as words are appended, and with others beside it."""
    (whole,) = bits(lm, [words], context)
    assert whole.min() > 0.01  # each word tells something
    appended = [
        np.abs(bits(lm, [words[:end]], context)[0] - whole[:end]).max()
        for end in range(1, len(words))
    ]
    mates = [words[:2], [w for s in SENTENCES[:6] for w in s.split() if w.isalpha()], words[1:]]
    beside = np.abs(bits(lm, [words, *mates], context)[0] - whole).max()
    return float(max(appended)), float(beside)


def exported(folder: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> OnnxFusionLM:
    """With an encoder; int8 is not held to the shipped text here, which takes seconds."""
    text = folder / "text.txt"
    text.write_text(SENTENCES[0])
    monkeypatch.setattr(exporter_module, "TEXT", text)
    monkeypatch.setattr(verify_module, "TEXT_LIMIT", 10.0)
    export_model(str(folder), folder / precision, encoder=True, precision=precision)
    return OnnxFusionLM(folder / precision, device="cpu", threads=1)


@pytest.mark.parametrize("policy", ["every", "incremental"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nothing_before_an_appended_word_moves(
    precision: str, policy: str, bpe, bert_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    options = {"fusion": "concat", "pooling": "static+mean@1+last", "policy": policy}
    folder = saved_model(tmp_path / "model", bpe, bert_folder, **options)
    lm = exported(folder, precision, monkeypatch)
    for context in ("sentence", "article"):
        appended, beside = moved(lm, WORDS, context)
        assert appended < LIMIT
        assert beside < LIMIT


def test_the_audit_finds_a_model_that_sees_the_future(
    bpe, bert_folder: Path, tmp_path: Path, monkeypatch
) -> None:
    options = {"fusion": "concat", "pooling": "mean", "view": "masked"}
    folder = saved_model(tmp_path / "model", bpe, bert_folder, **options)
    appended, beside = moved(exported(folder, "fp32", monkeypatch), WORDS, "sentence")
    assert appended > 100 * LIMIT
    assert beside < LIMIT
