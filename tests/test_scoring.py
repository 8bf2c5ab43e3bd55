"""Surprisal and perplexity against sums over the full distribution, one token at a time."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, small_model

import fusion_model
from fusion_model import scoring
from fusion_model.data.text import Document
from fusion_model.data.tokenizer import cut_vocabulary
from fusion_model.encoders import load_encoder
from fusion_model.errors import FusionLMError
from fusion_model.language_model import FusionLM
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.surprisal import SentenceScores, sum_words

DOCUMENTS = [Document("one", SENTENCES[:3]), Document("two", SENTENCES[3:5])]


def make(bpe, bert_folder: Path, fusion: str = "concat", **options: object) -> FusionLM:
    encoder = load_encoder(str(bert_folder), "mean")
    model = small_model(fusion=fusion, vocab_size=len(bpe), prefix_size=16, **options)
    planner = None if fusion == "none" else PrefixPlanner(encoder, bpe)
    return FusionLM(model, bpe, planner)


@torch.no_grad()
def expected_nats(
    lm: FusionLM, sequences: list[list[int]], sentence_starts: list[int]
) -> list[float]:
    """-log p of every token of each sequence after BOS, one forward call a token."""
    nats = []
    for sequence, start in zip(sequences, sentence_starts, strict=True):
        for t in range(start + 1, len(sequence)):
            given = torch.tensor([sequence[:t]])
            e = None
            if lm.planner is not None:
                vectors = []
                for end in range(t):
                    # The prefix of the sentence that this position stands in.
                    begin = max(i for i in range(end + 1) if sequence[i] == 1)
                    text = lm.tokenizer.decode(sequence[begin : end + 1], skip_special_tokens=True)
                    inputs = lm.planner.encoder.inputs_from_texts([text])
                    vectors.append(lm.planner.encoder.encode(inputs)[0])
                e = torch.stack(vectors)[None]
            logits = lm.model(given, prefix_embeds=e).logits[0, -1].double()
            nats.append(-float(torch.log_softmax(logits, -1)[sequence[t]]))
    return nats


def ids_of(lm: FusionLM, sentence: str) -> list[int]:
    return [1, *lm.tokenizer(sentence)["input_ids"], 2]


@pytest.mark.parametrize("fusion", ["none", "concat", "init_both"])
def test_scores_are_the_models(fusion: str, bpe, bert_folder: Path) -> None:
    lm = make(bpe, bert_folder, fusion)
    sentences = [s for d in DOCUMENTS for s in d.sentences]
    words = lm.score(DOCUMENTS)
    sequences = [ids_of(lm, s) for s in sentences]
    nats = expected_nats(lm, sequences, [0] * len(sequences))
    assert math.isclose(sum(w.nats for w in words), sum(nats), rel_tol=1e-5)
    texts = [w.text for w in words if w.text != "</s>"]
    assert texts == [w for s in sentences for w in s.split()]
    assert [w.document for w in words if w.word == 1] == ["one"] * 3 + ["two"] * 2
    assert words[0].bits == pytest.approx(words[0].nats / math.log(2))
    # The words of the first sentence, one by one.
    own = iter(expected_nats(lm, sequences[:1], [0]))
    for word in words[: len(sentences[0].split()) + 1]:
        assert word.nats == pytest.approx(sum(next(own) for _ in range(word.tokens)), abs=1e-4)


@pytest.mark.parametrize("context", ["sentence", "article"])
@pytest.mark.parametrize("policy", ["every", "sentence"])
def test_of_a_long_text_few_embeddings_are_in_memory(
    policy: str, context: str, bpe, bert_folder: Path, monkeypatch
) -> None:
    """Scores are the same; a policy that looks at the sentence before needs all of them."""
    lm = make(bpe, bert_folder)
    lm.planner = PrefixPlanner(load_encoder(str(bert_folder), "mean", policy=policy), bpe)
    whole = lm.score(DOCUMENTS, context=context), lm.perplexity(DOCUMENTS)
    made = []
    store = scoring.MemoryStore
    monkeypatch.setattr(scoring, "MemoryStore", lambda dim: made.append(store(dim)) or made[-1])
    monkeypatch.setattr(scoring, "IN_MEMORY", 20)
    assert lm.perplexity(DOCUMENTS).nats == pytest.approx(whole[1].nats, rel=1e-6)
    most = max(len(lm.tokenizer(s)["input_ids"]) + 1 for s in SENTENCES[:5])
    if policy == "every":
        assert len(made) > 1
        assert all(len(vectors._rows) < 20 + most for vectors in made)
    else:
        assert len(made) == 1
    for word, expected in zip(lm.score(DOCUMENTS, context=context), whole[0], strict=True):
        assert word.text == expected.text
        assert word.nats == pytest.approx(expected.nats, abs=1e-5)


@pytest.mark.parametrize("fusion", ["none", "add", "init_cell", "input"])
def test_article_context_goes_on(fusion: str, bpe, bert_folder: Path) -> None:
    lm = make(bpe, bert_folder, fusion)
    words = lm.score(DOCUMENTS, context="article")
    sequences, starts = [], []
    for document in DOCUMENTS:
        so_far: list[int] = []
        for sentence in document.sentences:
            starts.append(len(so_far))
            so_far = so_far + ids_of(lm, sentence)
            sequences.append(so_far)
    # EOS repeats the vector of the position before it, which `expected_nats` finds as well.
    expected = expected_nats(lm, sequences, starts)
    assert sum(w.nats for w in words) == pytest.approx(sum(expected), rel=1e-5)
    alone = lm.score(DOCUMENTS)
    first = len(DOCUMENTS[0].sentences[0].split()) + 1
    assert [w.nats for w in words[:first]] == pytest.approx(
        [w.nats for w in alone[:first]], abs=1e-4
    )
    assert words[first + 1].nats != pytest.approx(alone[first + 1].nats, abs=1e-4)


def test_perplexity_is_exp_of_the_mean(bpe, bert_folder: Path) -> None:
    lm = make(bpe, bert_folder)
    result = lm.perplexity(DOCUMENTS)
    sentences = [s for d in DOCUMENTS for s in d.sentences]
    nats = expected_nats(lm, [ids_of(lm, s) for s in sentences], [0] * 5)
    mean = sum(nats) / len(nats)
    assert result.tokens == len(nats)
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert result.bits_per_token == pytest.approx(mean / math.log(2), rel=1e-5)
    assert result.paper_perplexity == pytest.approx(2**mean, rel=1e-5)
    assert result.characters == sum(map(len, sentences))
    assert result.bits_per_character == pytest.approx(
        sum(nats) / math.log(2) / result.characters, rel=1e-5
    )
    words = sum(len(s.split()) for s in sentences)
    assert result.word_perplexity == pytest.approx(math.exp(sum(nats) / words), rel=1e-5)


SPACED = "The film , 漢字 — q ."


@torch.no_grad()
@pytest.mark.parametrize("text", [SENTENCES[0], SPACED])
@pytest.mark.parametrize("context", ["sentence", "article"])
def test_whitespace_correction(context: str, text: str, bpe, bert_folder: Path) -> None:
    lm = make(bpe, bert_folder, "none")
    document = [Document("one", [text])]
    plain = lm.score(document, context=context)
    corrected = lm.score(document, context=context, whitespace_correction=True)
    assert sum(w.nats for w in corrected) == pytest.approx(sum(w.nats for w in plain), abs=1e-4)
    boundary = [
        i for i in range(len(bpe)) if bpe.convert_ids_to_tokens(i).startswith("Ġ") or i == 2
    ]

    def space(tokens: list[int]) -> float:  # -log p(a word is over | tokens)
        logits = lm.model(torch.tensor([tokens])).logits[0, -1].double()
        return -float(torch.log_softmax(logits, -1)[boundary].logsumexp(0))

    sequence, seen = ids_of(lm, text), 1
    for i, (a, b) in enumerate(zip(plain, corrected, strict=True)):
        before = space(sequence[:seen]) if i else 0.0
        seen += a.tokens
        after = space(sequence[:seen]) if a.text != "</s>" else 0.0
        assert b.nats == pytest.approx(a.nats - before + after, abs=1e-4)


def test_a_space_counts_with_the_word_after_it(bpe, bert_folder: Path) -> None:
    """In one token with its first letters, or as a token of its own."""
    pieces = bpe.tokenize(SPACED)
    assert pieces.count("Ġ") > 2
    starts = [0, *(i for i, piece in enumerate(pieces) if piece.startswith("Ġ")), len(pieces)]
    words = make(bpe, bert_folder, "none").score([Document("d", [SPACED])])
    assert [w.tokens for w in words] == [*(b - a for a, b in pairwise(starts)), 1]


def test_correction_needs_a_vocabulary_that_marks_spaces(bert_folder: Path) -> None:
    encoder = load_encoder(str(bert_folder), "mean")
    cut = cut_vocabulary(encoder.tokenizer, SENTENCES, 100)
    lm = FusionLM(small_model(fusion="none", vocab_size=len(cut)), cut, None)
    assert [w.text for w in lm.score(SENTENCES[0])][:2] == ["The", "cat"]
    with pytest.raises(FusionLMError, match="whitespace correction needs a vocabulary"):
        lm.score(SENTENCES[0], whitespace_correction=True)


def test_words_of_many_tokens_and_many_bytes(bpe, bert_folder: Path) -> None:
    lm = make(bpe, bert_folder, "none")
    text = "Naïve “cats”, 漢字 and 🙂 sat."
    words = lm.score([Document("d", [text])])
    assert [w.text for w in words] == [*text.split(), "</s>"]
    assert sum(w.tokens for w in words) == len(bpe(text)["input_ids"]) + 1
    assert all(w.tokens > 0 for w in words)


def test_sums_that_disagree_are_not_returned() -> None:
    offsets = [(0, 1), (1, 3)]
    with pytest.raises((AssertionError, IndexError)):
        sum_words(["a", "b"], offsets, SentenceScores(torch.tensor([1.0, float("nan"), 1.0])))


def test_unknown_context_is_named(bpe, bert_folder: Path) -> None:
    with pytest.raises(
        FusionLMError, match="unknown context 'book': choose one of sentence, article"
    ):
        make(bpe, bert_folder).score("A cat.", context="book")


def test_generate_goes_on_from_the_prompt(bpe, bert_folder: Path) -> None:
    lm = make(bpe, bert_folder)
    greedy = lm.generate("The cat", max_new_tokens=5, do_sample=False)
    assert greedy[0].startswith("The cat")
    sampled = [lm.generate("The cat", max_new_tokens=9, do_sample=True, seed=s) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    beams = lm.generate("", max_new_tokens=4, num_beams=3, num_return_sequences=2)
    assert len(beams) == 2
    with pytest.raises(FusionLMError, match="cannot generate"):
        lm.generate("The", max_new_tokens=4, num_beams=2, num_return_sequences=5)


def test_forward_encodes_prefixes_by_itself(bpe, bert_folder: Path) -> None:
    lm = make(bpe, bert_folder, "init_hidden")
    ids = torch.tensor([ids_of(lm, SENTENCES[0])])
    logits = lm.model(ids).logits
    nats = expected_nats(lm, [ids[0].tolist()], [0])
    got = -torch.log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    assert got.tolist() == pytest.approx(nats, abs=1e-4)


def test_views_of_the_future_cannot_generate(bpe, bert_folder: Path) -> None:
    encoder = load_encoder(str(bert_folder), "mean")
    model = small_model(vocab_size=len(bpe), prefix_size=16, view="sentence")
    lm = FusionLM(model, bpe, PrefixPlanner(encoder, bpe, "sentence"))
    assert lm.score("A cat.")
    with pytest.raises(FusionLMError, match="view 'sentence' sees the future"):
        lm.generate("A")


def test_cache_of_prefixes_is_bounded_and_exact(bpe, bert_folder: Path) -> None:
    lm = make(bpe, bert_folder)
    cache = fusion_model.language_model.PrefixCache(lm.planner, size=5)
    ids = torch.tensor([ids_of(lm, s)[:6] for s in SENTENCES[:4]])
    expected = lm.model.prefix_encoder(ids, torch.ones_like(ids), 0)
    for _ in range(2):
        torch.testing.assert_close(cache(ids, torch.ones_like(ids), 0), expected)
        assert len(cache._vectors) == 5
    torch.testing.assert_close(cache(ids, torch.ones_like(ids), 4), expected[:, 4:])


def test_words_that_the_vocabulary_lacks_are_marked(bert_folder: Path) -> None:
    encoder = load_encoder(str(bert_folder), "mean")
    cut = cut_vocabulary(encoder.tokenizer, SENTENCES, 200)
    lm = FusionLM(small_model(fusion="none", vocab_size=len(cut)), cut, None)
    words = lm.score("The cat sat on the 喵 mat. 喵喵!")
    assert [w.text for w in words if w.unknown] == ["喵", "喵喵!"]
    assert [w.start for w in words][:3] == [0, 4, 8]
    words = lm.score("The cat \u200b sat.")  # which has no token
    assert [(w.tokens > 0, w.start, w.end) for w in words[2:4]] == [(False, 8, 9), (True, 10, 14)]
    assert (words[-1].start, words[-1].end) == (14, 14)


def test_long_work_says_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys) -> None:
    from fusion_model import progress

    clock = iter([0.0, 20.0, 70.0, 80.0, 7400.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.track("work", 4000, start=1000) as update:
        for done in (1500, 2000, 2100, 3000):
            update(done, "busy")
    assert capsys.readouterr().err.splitlines() == [
        "work: 2,000 of 4,000, busy; 1 min, 2 min left",
        "work: 3,000 of 4,000, busy; 2 h 3 min, 1 h 2 min left",
    ]


def test_texts_may_be_plain_or_several(bpe, bert_folder: Path) -> None:
    lm = make(bpe, bert_folder)
    texts = ["The cat sat. It ran.", "A dog."]
    words = lm.score(texts)
    assert [w.document for w in words if w.word == 1] == ["1", "1", "2"]
    apart = [w for text in texts for w in lm.score(text)]
    assert [w.nats for w in words] == pytest.approx([w.nats for w in apart], abs=1e-5)
    assert lm.perplexity(texts).nats == pytest.approx(sum(w.nats for w in words), rel=1e-6)
    assert lm.perplexity(texts[1]).tokens == sum(w.tokens for w in lm.score(texts[1]))
