"""Stage 8: surprisal and perplexity of text.

Surprisal is -log p(token | what precedes), in nats inside and in bits or nats where reported. A
word's is the sum over its tokens; words are what whitespace separates.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fusion_model.corpus import Batch, BatchSource
from fusion_model.errors import FusionLMError
from fusion_model.model import FusionLMForCausalLM

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
        return math.exp(self.nats_per_token)

    @property
    def word_perplexity(self) -> float:
        """exp(nats per word): comparable across vocabularies."""
        return math.exp(self.nats / self.words)

    @property
    def paper_perplexity(self) -> float:
        """2 ** nats, which arXiv 2208.02402 reports as perplexity."""
        return math.pow(2.0, self.nats_per_token)


@dataclass(frozen=True)
class WordScore:
    """Surprisal of one word.

    Attributes:
        document, sentence, word: where it stands; sentences and words are counted from 1.
        text: the word; `</s>` for the end of a sentence.
        nats: surprisal.
        tokens: tokens it consists of.
    """

    document: str
    sentence: int
    word: int
    text: str
    nats: float
    tokens: int

    @property
    def bits(self) -> float:
        return self.nats / math.log(2)


@dataclass(frozen=True)
class SentenceScores:
    """Surprisals in nats of one sentence's tokens x1 … xn, EOS, [n + 1] float32.

    `boundary` holds, where asked for, -log p(the next token starts a word or ends the
    sentence) at the same positions.
    """

    tokens: Tensor
    boundary: Tensor | None = None


@torch.inference_mode()
def token_surprisals(model: FusionLMForCausalLM, batch: Batch) -> list[Tensor]:
    """Surprisals in nats of each sentence of a batch, each on its own."""
    log_probs = model.token_log_probs(batch.input_ids, batch.prefix_embeds, batch.lengths)
    return list((-log_probs).cpu().split((batch.lengths - 1).tolist()))


@torch.inference_mode()
def score_sentences(
    model: FusionLMForCausalLM, source: BatchSource, boundary_ids: Tensor | None = None
) -> list[SentenceScores]:
    """Every sentence on its own, in the corpus' order.

    Args:
        source: the sentences with their embeddings.
        boundary_ids: tokens that start a word, and EOS; see `word_boundary_ids`.
    """
    results: dict[int, SentenceScores] = {}
    for indices in source.plan(8192 if boundary_ids is None else 2048):
        batch = source.batch(indices).to(model.device)
        surprisals = token_surprisals(model, batch)
        for row, index in enumerate(indices):
            results[int(index)] = SentenceScores(surprisals[row])
        if boundary_ids is None:
            continue
        features, _ = model.features(
            batch.input_ids[:, :-1], None, batch.prefix_embeds, use_cache=False
        )
        for row, index in enumerate(indices):
            own = features[row, : int(batch.lengths[row]) - 1]
            boundary = _boundary_surprisals(model, own, boundary_ids)
            results[int(index)] = SentenceScores(surprisals[row], boundary)
    return [results[i] for i in range(len(source.lengths))]


@torch.inference_mode()
def score_articles(
    model: FusionLMForCausalLM,
    source: BatchSource,
    starts: Sequence[bool],
    boundary_ids: Tensor | None = None,
) -> Iterator[SentenceScores]:
    """As `score_sentences`, but the LSTM's state goes on from one sentence to the next.

    The prefix embedding stays that of the sentence: an article outgrows an encoder's window.

    Args:
        starts: true where an article begins and the state is reset.
    """
    state = None
    for index, first in enumerate(starts):
        batch = source.batch([index]).to(model.device)
        e = batch.prefix_embeds
        if e is not None:  # EOS is read too, on the way to the next sentence
            e = torch.cat([e, e[:, -1:]], dim=1)
        features, state = model.features(
            batch.input_ids, prefix_embeds=e, state=None if first else state
        )
        log_probs = torch.log_softmax(model.lm_head(features[0, :-1]).float(), dim=-1)
        tokens = -log_probs.gather(1, batch.input_ids[0, 1:, None])[:, 0].cpu()
        boundary = None
        if boundary_ids is not None:
            boundary = -log_probs[:, boundary_ids].logsumexp(dim=-1).cpu()
        yield SentenceScores(tokens, boundary)


def _boundary_surprisals(model: FusionLMForCausalLM, features: Tensor, ids: Tensor) -> Tensor:
    log_probs = torch.log_softmax(model.lm_head(features).float(), dim=-1)
    return -log_probs[:, ids].logsumexp(dim=-1).cpu()


def word_boundary_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
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
    return torch.tensor([*ids, int(tokenizer.eos_token_id)])


def sum_words(
    words: Sequence[str],
    offsets: Sequence[tuple[int, int]],
    scores: SentenceScores,
) -> list[tuple[str, float, int]]:
    """(word, nats, tokens) of each word of a sentence, and of `</s>` last.

    With `scores.boundary`, a word's space counts with it and not with the next word: the
    correction of Pimentel & Meister (2024) and Oh & Schuler (2024). The first word has no
    space before it, so it gives none up; the total stays the same.

    Args:
        words: the sentence is these, joined by single spaces.
        offsets: (start, end) of every token in that sentence, spaces included or not.
    """
    starts, position = [], 0
    for word in words:
        starts.append(position)
        position += len(word) + 1
    nats, counts = [0.0] * (len(words) + 1), [0] * (len(words) + 1)
    first_token = [len(offsets)] * (len(words) + 1)
    at = 0
    for token, (_, end) in enumerate(offsets):
        while at + 1 < len(words) and end > starts[at + 1]:
            at += 1
        nats[at] += float(scores.tokens[token])
        counts[at] += 1
        first_token[at] = min(first_token[at], token)
    nats[-1], counts[-1] = float(scores.tokens[-1]), 1
    total = float(scores.tokens.double().sum())
    if scores.boundary is not None:
        for i in range(1, len(nats)):
            space = float(scores.boundary[first_token[i]])
            nats[i] -= space
            nats[i - 1] += space
    if not math.isclose(math.fsum(nats), total, rel_tol=1e-6, abs_tol=1e-4):
        raise AssertionError(f"word sums {math.fsum(nats)} differ from token sums {total}")
    return list(zip([*words, "</s>"], nats, counts, strict=True))
