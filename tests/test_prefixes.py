"""What the encoder is shown, and which vector each position gets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from transformers import AutoModel, AutoTokenizer

from fusion_model.data.batches import Batches
from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document
from fusion_model.data.tokenizer import cut_vocabulary
from fusion_model.encoders import load_encoder
from fusion_model.encoders.controls import BagEncoder, ZeroEncoder
from fusion_model.encoders.inputs import EncoderInput
from fusion_model.errors import FusionLMError
from fusion_model.prefixes.embed import embed_corpus
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.prefixes.store import MemoryStore
from fusion_model.prefixes.views import parse_view, prefix_texts, shown, shuffle_rows

WORDS = ["", "The", "The cat", "The cat sat", "The cat sat down"]


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("prefix", WORDS),
        ("sentence", ["The cat sat down"] * 5),
        ("left:0.5", ["", "The", "The cat", "The cat", "The cat"]),
        ("right:0.5", ["", "", "", "sat", "sat down"]),
        ("left:0", [""] * 5),
        ("right:0", WORDS),
        ("previous", ["It slept."] * 5),
        (
            "masked",
            [
                "[MASK] cat sat down",
                "The [MASK] sat down",
                "The cat [MASK] down",
                "The cat sat [MASK]",
                "The cat sat down [MASK]",
            ],
        ),
    ],
)
def test_views(view: str, expected: list[str]) -> None:
    texts = shown(WORDS, view, "It slept.", lambda a, b: f"{a.strip()} [MASK]{b}")
    assert [text.strip() for text in texts] == expected
    whole = [11, 12, 13, 14]
    prefixes = [whole[:t] for t in range(5)]
    ids = shown(prefixes, view, [7], lambda a, b: [*a, 99, *b])
    named = {11: "The", 12: "cat", 13: "sat", 14: "down", 99: "[MASK]", 7: "It slept."}
    assert [" ".join(named[i] for i in row) for row in ids] == expected


@pytest.mark.parametrize("view", ["prefixes", "left", "left:2", "prefix:1", "right:x"])
def test_unknown_views_are_named(view: str) -> None:
    with pytest.raises(FusionLMError, match=f"unknown view '{view}'"):
        parse_view(view)


def test_prefix_texts_end_with_the_tokens(bpe) -> None:
    text = "The cat 漢 sat"
    ids = bpe(text)["input_ids"]
    texts = prefix_texts(bpe, ids)
    assert texts[0] == ""
    assert texts[-1] == text
    assert len(texts) == len(ids) + 1
    for t in range(len(ids)):
        whole = bpe.decode(ids[:t])  # an unfinished character shows as �: it is left out
        assert texts[t] == whole.rstrip("�")


def test_special_tokens_are_not_shown(bpe) -> None:
    ids = bpe("The cat")["input_ids"]
    planner = PrefixPlanner(BagEncoder.fit("counts", SENTENCES), bpe)
    assert planner.inputs([[1, *ids, 2]]) == planner.inputs([ids])
    assert planner.inputs([ids])[-1] == EncoderInput(text="The cat")


def test_shuffles() -> None:
    rows, lengths = np.arange(60), [10, 20, 30]
    assert shuffle_rows(rows, lengths, "none") is rows
    within = shuffle_rows(rows, lengths, "sentence", seed=1)
    across = shuffle_rows(rows, lengths, "corpus", seed=1)
    start = 0
    for n in lengths:
        part = slice(start, start + n)
        assert sorted(within[part]) == list(rows[part])
        assert sorted(across[part]) != list(rows[part])
        start += n
    assert (within != rows).any()
    assert sorted(across) == list(rows)
    with pytest.raises(FusionLMError, match="unknown shuffle"):
        shuffle_rows(rows, lengths, "words")


def one_at_a_time(folder: Path, text: str) -> torch.Tensor:
    """Mean pooling of one text, by transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    with torch.no_grad():
        hidden = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state
    return hidden.mean(1)[0]


def close(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5, rtol=0)


def test_every_position_gets_its_own_prefix(bpe, bert_folder: Path) -> None:
    documents = [Document("a", SENTENCES[:3]), Document("b", SENTENCES[3:5])]
    corpus = Corpus.from_documents(documents, bpe)
    encoder = load_encoder(str(bert_folder), "mean")
    store = MemoryStore(encoder.dim)
    seen = []
    rows = embed_corpus(
        corpus, PrefixPlanner(encoder, bpe), store, lambda done, of: seen.append((done, of))
    )
    total = sum(len(s) - 1 for s in corpus.sentences)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(set(rows)) < total  # the empty prefix, at least, is shared
    batch = Batches(corpus, rows, store, 0).batch([4, 1])
    for row, index in enumerate((4, 1)):
        ids = corpus.sentences[index]
        assert batch.input_ids[row, : len(ids)].tolist() == ids
        for t in range(len(ids) - 1):
            expected = one_at_a_time(bert_folder, bpe.decode(ids[1 : t + 1]))
            close(batch.prefix_embeds[row, t], expected)


def test_previous_view_starts_anew_with_each_document(bpe, bert_folder: Path) -> None:
    documents = [Document("a", SENTENCES[:2]), Document("b", SENTENCES[2:3])]
    corpus = Corpus.from_documents(documents, bpe)
    encoder = load_encoder(str(bert_folder), "mean")
    store = MemoryStore(encoder.dim)
    rows = embed_corpus(corpus, PrefixPlanner(encoder, bpe, "previous"), store)
    first, second, third = np.split(rows, np.cumsum(corpus.positions)[:-1])
    empty = one_at_a_time(bert_folder, "")
    close(store.gather(first)[-1], empty)
    close(store.gather(third)[0], empty)
    before = one_at_a_time(bert_folder, SENTENCES[0])
    close(store.gather(second)[0], before)


def test_shared_vocabulary_gives_tokens_to_the_encoder(bert_folder: Path) -> None:
    encoder = load_encoder(str(bert_folder), "mean")
    cut = cut_vocabulary(encoder.tokenizer, SENTENCES, 10_000)
    corpus = Corpus.from_documents([Document("a", SENTENCES[:1])], cut)
    store = MemoryStore(encoder.dim)
    rows = embed_corpus(corpus, PrefixPlanner(encoder, cut, shares_vocabulary=True), store)
    words = encoder.tokenizer.tokenize(SENTENCES[0])
    for t in range(len(words) + 1):
        expected = one_at_a_time(bert_folder, " ".join(words[:t]))
        close(store.gather(rows)[t], expected)


@pytest.mark.parametrize("name", ["tfidf", "counts", "zeros"])
def test_controls_without_a_pretrained_model(name: str, bpe, tmp_path: Path) -> None:
    encoder = ZeroEncoder(4) if name == "zeros" else BagEncoder.fit(name, SENTENCES)
    encoder.save(tmp_path)
    again = load_encoder(name, directory=tmp_path, dim=4)
    assert again.fingerprint == encoder.fingerprint
    texts = ["", "the cat", "the cat sat", "cat the the"]
    vectors = encoder.encode(encoder.inputs_from_texts(texts))
    assert np.array_equal(vectors, again.encode(again.inputs_from_texts(texts)))
    assert vectors.shape == (4, encoder.dim)
    assert not vectors[0].any()
    if name == "counts":
        words = sorted({w for s in SENTENCES for w in s.lower().replace("?", "").replace(",", "")
                        .replace(".", "").split() if len(w) > 1})  # fmt: skip
        expected = [[t.split().count(w) for w in words] for t in texts]
        assert vectors.tolist() == expected


def test_batches_cover_every_sentence_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(2, 40, 300)
    corpus = Corpus([[1] * n for n in lengths], [False] * 300, 1)
    source = Batches(corpus, None, None, 0)
    for seed in (None, 3):
        plan = source.plan(256, seed)
        assert sorted(np.concatenate(plan)) == list(range(300))
        assert max(len(b) * lengths[b].max() for b in plan) <= 256
        padding = sum(len(b) * lengths[b].max() for b in plan) / lengths.sum()
        assert padding < 1.1
    assert all(len(b) >= 4 for b in source.plan(8, 3, least=4))
    first, again, other = (source.plan(256, s) for s in (3, 3, 4))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert [list(b) for b in first] != [list(b) for b in other]
