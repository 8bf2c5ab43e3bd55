"""Stage 8: surprisal of the tokens of text, whatever runs the model; needs no PyTorch.

`TextModel` is what `fusion_model.FusionLM` and `fusion_model.export.OnnxFusionLM` have in common:
each says how log-probabilities come about, and all that is made of them stands here.
`fusion_model.surprisal` sums tokens to words.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from fusion_model import progress
from fusion_model.data.batches import Batches, Vectors
from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document, split_sentences
from fusion_model.data.tokenizer import AS_TEXT
from fusion_model.errors import FusionLMError
from fusion_model.prefixes.embed import embed_corpus
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.prefixes.store import MemoryStore
from fusion_model.prefixes.views import shuffle_rows
from fusion_model.surprisal import (
    CONTEXTS,
    Perplexity,
    SentenceScores,
    WordScore,
    boundary_ids,
    word_scores,
)

IN_MEMORY = 2**16  # positions; their embeddings are some hundred megabytes
Array = np.ndarray
Text = str | Sequence[str | Document]
"""Plain text, which is split into sentences, several such texts, or documents."""
LogProbs = tuple[np.ndarray, np.ndarray | None, Any]
"""Of the targets [N], of a boundary token [N] (None where not asked for), and the state after."""


class TextModel(ABC):
    """A language model with its tokenizer and encoder.

    Attributes:
        tokenizer: adds neither BOS nor EOS by itself.
        planner: prefixes to encoder; None for an unfused model.
        shuffle: one of `fusion_model.prefixes.views.SHUFFLES`, as in training.
        tokens_per_batch: most padded tokens that are scored at once.
    """

    tokenizer: Any
    planner: PrefixPlanner | None
    shuffle: str
    tokens_per_batch: int

    @abstractmethod
    def log_probs(
        self, ids: Array, targets: Array, e: Array | None, boundary: Array | None, state: Any
    ) -> LogProbs:
        """log p of the tokens that follow, in nats, float32, row after row.

        Args:
            ids: [B, T] int64, padded on the right.
            targets: the token after each, [B, T] int64; -1 where none is asked for.
            e: [B, T, E] float32, embeddings of the prefixes that end at each; None if unfused.
            boundary: [K] int64: how likely is one of these, whichever, in the target's place?
            state: from an earlier call, whose tokens these follow; or None.
        """

    def encode_corpus(self, corpus: Corpus, store: Vectors | None = None) -> Batches:
        """The corpus with the embeddings of its positions, in memory or in `store`."""
        pad = self.tokenizer.pad_token_id or 0
        if self.planner is None:
            return Batches(corpus, None, None, pad)
        if store is None:
            store = MemoryStore(self.planner.encoder.dim)
        with progress.track("prefix embeddings", sum(corpus.positions)) as update:
            rows = embed_corpus(corpus, self.planner, store, update)
        note_outgrown(self.planner)
        return Batches(corpus, shuffle_rows(rows, corpus.positions, self.shuffle), store, pad)

    def _encoded(self, corpus: Corpus, store: Vectors | None) -> Iterator[Batches]:
        """As `encode_corpus`; without a store a part of a long text at a time, so that memory does
        not grow by its embeddings."""
        planner, total, done = self.planner, sum(corpus.positions), 0
        apart = planner is not None and not planner.reads_previous and self.shuffle == "none"
        if planner is None or store is not None or not apart or total <= IN_MEMORY:
            yield self.encode_corpus(corpus, store)
            return
        with progress.track("scoring", total) as update:
            for part in corpus.parts(IN_MEMORY):
                vectors = MemoryStore(planner.encoder.dim)

                def told(n: int, _: int, before: int = done) -> None:
                    update(before + n)

                rows = embed_corpus(part, planner, vectors, told)
                yield Batches(part, rows, vectors, self.tokenizer.pad_token_id or 0)
                done += len(rows)
        note_outgrown(planner)

    def open_store(
        self, path: Path | str | None, writable: bool = True
    ) -> AbstractContextManager[Vectors | None]:
        """The store of this model's embeddings at `path`; nothing for an unfused model."""
        if path is None or self.planner is None:
            return nullcontext()
        return self.planner.open_store(path, writable=writable)

    def perplexity(self, text: Text, store: Vectors | None = None) -> Perplexity:
        """How well the model predicts a text, sentence by sentence."""
        documents = to_documents(text)
        corpus = Corpus.from_documents(documents, self.tokenizer)
        if not corpus.sentences:
            raise FusionLMError("there is no sentence to score: give some text")
        scores = [
            s for batches in self._encoded(corpus, store) for s in score_sentences(self, batches)
        ]
        return Perplexity(
            nats=math.fsum(nats for s in scores for nats in s.tokens.tolist()),
            tokens=sum(len(s.tokens) for s in scores),
            words=sum(len(s.split()) for d in documents for s in d.sentences),
            characters=corpus.characters,
        )

    def score(
        self,
        text: Text,
        *,
        context: str = "sentence",
        whitespace_correction: bool = False,
        store: Vectors | None = None,
    ) -> list[WordScore]:
        """Surprisal of every word of a text, the first too, and of every sentence end.

        Args:
            context: `sentence`, as the model is trained, or `article`: the LSTM's state goes
                on through each document.
            whitespace_correction: see `fusion_model.surprisal.sum_words`.

        Raises:
            FusionLMError: unknown context; a correction that the vocabulary does not allow; a
                model exported without its encoder.
        """
        if context not in CONTEXTS:
            raise FusionLMError(f"unknown context {context!r}: choose one of {', '.join(CONTEXTS)}")
        boundary = np.array(boundary_ids(self.tokenizer)) if whitespace_correction else None
        documents = to_documents(text)
        corpus = Corpus.from_documents(documents, self.tokenizer)
        scores: list[SentenceScores] = []
        state = None
        for batches in self._encoded(corpus, store):
            if context == "sentence":
                scores += score_sentences(self, batches, boundary)
            else:
                found, state = score_articles(self, batches, boundary, state)
                scores += found
        return word_scores(self.tokenizer, documents, scores)

    def prompt_row(self, prompt: str) -> list[int]:
        """BOS and the prompt's tokens."""
        ids = self.tokenizer(" ".join(prompt.split()), **AS_TEXT)["input_ids"]
        return [self.tokenizer.bos_token_id or 0, *ids]


def to_documents(text: Text) -> list[Document]:
    """One for each text; several have their number, from 1, as name."""
    if isinstance(text, str):
        return [Document("text", split_sentences(text), text)]
    return [
        Document(str(i), split_sentences(t), t) if isinstance(t, str) else t
        for i, t in enumerate(text, start=1)
    ]


def note_outgrown(planner: PrefixPlanner) -> None:
    """Say which sentences the encoder read in windows, once."""
    if planner.outgrown:
        several, first = len(planner.outgrown), planner.tokenizer.decode(planner.outgrown[0][:12])
        progress.note(
            f"{several} sentence{'s' * (several > 1)} (the first begins {first!r}) outgrow the "
            "encoder's window: it sees their last part only. Are line ends missing that end a "
            "sentence? --split lines takes each line as one"
        )
        planner.outgrown.clear()


def next_tokens(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Targets of sentences that are scored alone: what follows in them, -1 at padding.

    Args:
        ids: [B, T + 1].
        lengths: real tokens of each, [B].
    """
    real = np.arange(1, ids.shape[1]) < lengths[:, None]
    return np.where(real, ids[:, 1:], -1)


def score_sentences(
    model: TextModel, batches: Batches, boundary: np.ndarray | None = None
) -> list[SentenceScores]:
    """Every sentence on its own, in the corpus' order.

    Args:
        batches: the sentences with their embeddings.
        boundary: tokens that start a word, and EOS, [K]; see `fusion_model.surprisal`.
    """
    results: dict[int, SentenceScores] = {}
    # Of a boundary all scores of the vocabulary are kept at once.
    size = model.tokens_per_batch if boundary is None else min(2048, model.tokens_per_batch)
    for indices in batches.plan(size):
        ids, e, lengths = batches.batch(indices)
        found = model.log_probs(ids[:, :-1], next_tokens(ids, lengths), e, boundary, None)
        results.update(zip(indices.tolist(), _by_sentence(found, lengths), strict=True))
    return [results[i] for i in range(len(batches.lengths))]


def score_articles(
    model: TextModel, batches: Batches, boundary: np.ndarray | None, state: Any
) -> tuple[list[SentenceScores], Any]:
    """As `score_sentences`, but the LSTM's state goes on through each document, and from `state`
    where the first sentence starts none; the state after the last one is returned, too.

    The prefix embedding stays that of the sentence: an article outgrows an encoder's window.
    """
    scores: list[SentenceScores] = []
    for index, first in enumerate(batches.corpus.starts_document):
        ids, e, lengths = batches.batch([index])
        if e is not None:  # EOS is read too, on the way to the next sentence
            e = np.concatenate([e, e[:, -1:]], axis=1)
        targets = np.append(ids[:, 1:], [[-1]], axis=1)
        found = model.log_probs(ids, targets, e, boundary, None if first else state)
        state = found[2]
        scores += _by_sentence(found, lengths)
    return scores, state


def _by_sentence(found: LogProbs, lengths: np.ndarray) -> list[SentenceScores]:
    tokens, boundary, _ = found
    ends = np.cumsum(lengths - 1)[:-1]
    if boundary is None:
        return list(map(SentenceScores, np.split(-tokens, ends)))
    return list(map(SentenceScores, np.split(-tokens, ends), np.split(-boundary, ends)))
