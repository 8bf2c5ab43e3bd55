"""Stage 6: batches of token ids with the vectors of their positions.

A sentence `BOS x1 … xn EOS` has n + 2 tokens and n + 1 positions: the last token predicts
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fusion_model.data.corpus import Corpus

ROWS = 16  # a batch of a multiple of these is not padded for the matrix units


class KeyedRows(Protocol):
    """What planning needs of a store; see `fusion_model.data.batches.Vectors`."""

    def row(self, key: bytes) -> int:
        """Row of a key, -1 where there is none."""

    def append(self, keys: Sequence[bytes], vectors: Any) -> None:
        """Add rows, [len(keys), dim]."""


class Vectors(KeyedRows, Protocol):
    """Vectors by key; `EmbeddingStore` keeps them on disk, `MemoryStore` in memory."""

    dim: int

    def gather(self, rows: np.ndarray) -> Tensor:
        """Vectors of rows, [*rows.shape, dim] float32."""


@dataclass(frozen=True)
class Batch:
    """Sentences padded on the right.

    Attributes:
        input_ids: [B, T].
        lengths: real tokens of each, [B].
        prefix_embeds: [B, T - 1, E] float32, or None.
    """

    input_ids: Tensor
    lengths: Tensor
    prefix_embeds: Tensor | None

    def to(self, device: torch.device | str) -> "Batch":
        e = self.prefix_embeds
        return Batch(
            self.input_ids.to(device),
            self.lengths.to(device),
            None if e is None else e.to(device),
        )


class Batching:
    """The sentences of a corpus as padded arrays.

    Args:
        corpus: the sentences.
        rows: store row of every position, [P]; None for an unfused model.
        pad_token_id: fills the ids on the right.
    """

    def __init__(self, corpus: Corpus, rows: np.ndarray | None, pad_token_id: int) -> None:
        self.corpus, self._rows, self._pad = corpus, rows, pad_token_id
        self.lengths = np.array([len(s) for s in corpus.sentences])
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths - 1)])

    def padded(
        self, indices: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Ids [B, T] int64, lengths [B], and store rows [B, T - 1] of the sentences."""
        lengths = self.lengths[indices]
        ids = np.full((len(indices), lengths.max()), self._pad, dtype=np.int64)
        for row, index in enumerate(indices):
            ids[row, : lengths[row]] = self.corpus.sentences[index]
        if self._rows is None:
            return ids, lengths, None
        where = np.zeros((len(indices), lengths.max() - 1), dtype=np.int64)
        for row, index in enumerate(indices):
            start, end = self._offsets[index], self._offsets[index + 1]
            where[row, : end - start] = self._rows[start:end]
        return ids, lengths, where

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


class BatchSource(Batching):
    """Batches of a corpus with the embeddings of its positions.

    Args:
        corpus: the sentences.
        rows: store row of every position, [P]; None for an unfused model.
        store: where the vectors are.
        pad_token_id: fills `input_ids` on the right.
    """

    def __init__(
        self, corpus: Corpus, rows: np.ndarray | None, store: Vectors | None, pad_token_id: int
    ) -> None:
        super().__init__(corpus, rows, pad_token_id)
        self._store = store

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The sentences of these indices, in this order."""
        ids, lengths, rows = self.padded(indices)
        embeds = None
        if rows is not None and self._store is not None:
            embeds = self._store.gather(rows)
        return Batch(torch.from_numpy(ids), torch.from_numpy(lengths), embeds)
