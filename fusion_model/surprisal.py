"""Token scores into what is reported: words, sentence ends, perplexity.

Surprisal is -log p(token | what precedes), in nats inside and in bits or nats where reported. A
word's is the sum over its tokens; words are what whitespace separates. Nothing here needs PyTorch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from fusion_model.data.text import Document
from fusion_model.data.tokenizer import AS_TEXT
from fusion_model.errors import FusionLMError

CONTEXTS = ("sentence", "article")


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text, EOS of every sentence included.

    Attributes:
        nats: total negative log-likelihood.
        tokens, words, characters: sizes of the text; tokens include EOS.
    """

    nats: float
    tokens: int
    words: int
    characters: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / math.log(2)

    @property
    def bits_per_character(self) -> float:
        return self.nats / math.log(2) / self.characters

    @property
    def perplexity(self) -> float:
        """exp(nats per token): the true one."""
        return _power(math.e, self.nats_per_token)

    @property
    def word_perplexity(self) -> float:
        """exp(nats per word): comparable across vocabularies; of text without spaces infinite."""
        return _power(math.e, self.nats / self.words)

    @property
    def paper_perplexity(self) -> float:
        """2 ** nats, which arXiv 2208.02402 reports as perplexity."""
        return _power(2.0, self.nats_per_token)


def _power(base: float, exponent: float) -> float:
    try:
        return math.pow(base, exponent)
    except OverflowError:
        return math.inf


def sum_perplexity(parts: Sequence[Perplexity]) -> Perplexity:
    """Of a text, from that of its parts."""
    sizes = zip(*((p.tokens, p.words, p.characters) for p in parts), strict=True)
    return Perplexity(math.fsum(p.nats for p in parts), *map(sum, sizes))


@dataclass(frozen=True)
class WordScore:
    """Surprisal of one word.

    Attributes:
        document, sentence, word: where it stands; sentences and words are counted from 1.
        text: the word; `</s>` for the end of a sentence.
        nats: surprisal.
        tokens: tokens it consists of.
        start, end: characters of the document's text that it takes, counted from 0, `end` not
            included; both the end of the last word for the end of a sentence.
        unknown: the vocabulary lacks a part of it, so that its surprisal is of another word.
    """

    document: str
    sentence: int
    word: int
    text: str
    nats: float
    tokens: int
    start: int
    end: int
    unknown: bool

    @property
    def bits(self) -> float:
        return self.nats / math.log(2)


@dataclass(frozen=True)
class SentenceScores:
    """Surprisals in nats of one sentence's tokens x1 … xn, EOS, [n + 1] float32.

    `boundary` holds, where asked for, -log p(the next token starts a word or ends the
    sentence) at the same positions.
    """

    tokens: np.ndarray
    boundary: np.ndarray | None = None


def boundary_ids(tokenizer: Any) -> list[int]:
    """Tokens that begin with a space, and EOS, which ends a word too.

    Raises:
        FusionLMError: the vocabulary does not mark spaces (WordPiece): whether a word is over
            cannot be told from the next token.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    ids = [i for i, piece in enumerate(pieces) if piece.startswith("Ġ")]
    if not ids:
        raise FusionLMError(
            "the whitespace correction needs a vocabulary whose tokens begin with the space "
            "(byte-level BPE); this model's does not"
        )
    return [*ids, int(tokenizer.eos_token_id)]


def sum_words(
    words: Sequence[str],
    offsets: Sequence[tuple[int, int]],
    scores: SentenceScores,
) -> list[tuple[str, float, int]]:
    """(word, nats, tokens) of each word of a sentence, and of `</s>` last.

    The space before a word counts with it, in one token with its first letters or alone. With
    `scores.boundary` the space after it does: the correction of Pimentel & Meister (2024) and Oh &
    Schuler (2024). The first word has no space before it, so it gives none up; the total stays
    the same.

    Args:
        words: the sentence is these, joined by single spaces.
        offsets: (start, end) of every token in that sentence, spaces included or not.
    """
    spaces = np.cumsum([len(word) + 1 for word in words])[:-1] - 1  # before all but the first word
    of_token = np.searchsorted(spaces, [start for start, _ in offsets], side="right")
    nats = np.append(np.bincount(of_token, scores.tokens[:-1], len(words)), scores.tokens[-1])
    counts = np.append(np.bincount(of_token, minlength=len(words)), 1)
    if scores.boundary is not None:
        first_tokens = np.searchsorted(of_token, np.arange(1, len(nats)))
        of_space = scores.boundary[first_tokens].astype(float)
        nats[1:] -= of_space
        nats[:-1] += of_space
    total = math.fsum(scores.tokens.tolist())
    if not math.isclose(math.fsum(nats), total, rel_tol=1e-6, abs_tol=1e-4):
        raise AssertionError(f"word sums {math.fsum(nats)} differ from token sums {total}")
    return list(zip([*words, "</s>"], nats.tolist(), counts.tolist(), strict=True))


def word_scores(
    tokenizer: Any, documents: Sequence[Document], scores: Sequence[SentenceScores]
) -> list[WordScore]:
    """Every word and sentence end of the documents, from the scores of their sentences."""
    results, remaining = [], iter(scores)
    lacking = getattr(tokenizer, "unk_token_id", None)
    for document in documents:
        end = 0
        for number, sentence in enumerate(document.sentences, start=1):
            encoding = tokenizer(sentence, **AS_TEXT, return_offsets_mapping=True)
            words = sum_words(sentence.split(), encoding["offset_mapping"], next(remaining))
            ids = iter(encoding["input_ids"])
            for place, (word, nats, tokens) in enumerate(words, start=1):
                own = list(islice(ids, tokens))  # none of a sentence end
                if place < len(words):  # the last is the sentence end
                    end = document.text.index(word, end) + len(word)
                start = end - len(word) if place < len(words) else end
                unknown = lacking is not None and lacking in own
                at = document.name, number, place
                results.append(WordScore(*at, word, nats, tokens, start, end, unknown))
    return results
