"""Stage 6: a tokenised corpus, the store rows of its positions, and batches of both.

A sentence `BOS x1 … xn EOS` has n + 2 tokens and n + 1 positions: the last token predicts
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fusion_model.planning import Batching, Corpus
from fusion_model.store import Vectors


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
