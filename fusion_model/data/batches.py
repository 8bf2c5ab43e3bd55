"""Stage 6: batches of token ids with the vectors of their positions.

A sentence `BOS x1 … xn EOS` has n + 2 tokens and n + 1 positions: the last token predicts
nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fusion_model.data.corpus import Corpus

ROWS = 16  # a batch of a multiple of these is not padded for the matrix units


class Vectors(Protocol):
    """Vectors by key; `EmbeddingStore` keeps them on disk, `MemoryStore` in memory."""

    def row(self, key: bytes) -> int:
        """Row of a key, -1 where there is none."""

    def append(self, keys: Sequence[bytes], vectors: Any) -> None:
        """Add rows, [len(keys), dim], an array or a tensor on the CPU."""

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of rows, [*rows.shape, dim] float32."""


class Batch(NamedTuple):
    """Sentences padded on the right.

    Attributes:
        input_ids: [B, T] int64.
        prefix_embeds: [B, T - 1, E] float32, or None for an unfused model.
        lengths: real tokens of each, [B] int64.
    """

    input_ids: np.ndarray
    prefix_embeds: np.ndarray | None
    lengths: np.ndarray


class Batches:
    """The sentences of a corpus in batches, with the embeddings of their positions.

    Args:
        corpus: the sentences.
        rows: store row of every position, [P]; None for an unfused model.
        store: where the vectors are.
        pad_token_id: fills `input_ids` on the right.
    """

    def __init__(
        self, corpus: Corpus, rows: np.ndarray | None, store: Vectors | None, pad_token_id: int
    ) -> None:
        self.corpus, self._rows, self._store, self._pad = corpus, rows, store, pad_token_id
        self.lengths = np.array([len(s) for s in corpus.sentences])
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths - 1)])

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The sentences of these indices, in this order."""
        lengths = self.lengths[indices]
        ids = np.full((len(indices), lengths.max()), self._pad, dtype=np.int64)
        for row, index in enumerate(indices):
            ids[row, : lengths[row]] = self.corpus.sentences[index]
        if self._rows is None or self._store is None:
            return Batch(ids, None, lengths)
        where = np.zeros((len(indices), lengths.max() - 1), dtype=np.int64)
        for row, index in enumerate(indices):
            own = self._rows[self._offsets[index] : self._offsets[index + 1]]
            where[row, : len(own)] = own
        return Batch(ids, self._store.gather(where), lengths)

    def sample(self, count: int) -> np.ndarray:
        """Vectors of about so many positions, evenly spread, [N, E] float32."""
        assert self._rows is not None
        assert self._store is not None
        return self._store.gather(self._rows[:: max(1, len(self._rows) // count)])

    def plan(
        self, tokens_per_batch: int, seed: int | None = None, least: int = 1
    ) -> list[np.ndarray]:
        """Sentence indices of each batch: similar lengths together, padded size within budget.

        Args:
            tokens_per_batch: most padded tokens a batch holds (one sentence may exceed it).
            seed: shuffles; None keeps a fixed order, shortest first.
            least: fewest sentences a batch holds, where the corpus allows.
        """
        order = np.arange(len(self.lengths))
        generator = np.random.default_rng(seed)
        if seed is not None:
            order = generator.permutation(order)
        order = order[np.argsort(self.lengths[order], kind="stable")]
        batches, start = [], 0
        for end in range(1, len(order) + 1):
            full = (
                end == len(order) or (end + 1 - start) * self.lengths[order[end]] > tokens_per_batch
            )
            if full and (end - start >= least or end == len(order)):
                rows = end - start
                if rows > 2 * max(ROWS, least) and end < len(order):
                    rows -= rows % ROWS
                batches.append(order[start : start + rows])
                start += rows
        if seed is not None:
            generator.shuffle(batches)
        return batches
