"""Prefix embeddings of many texts that grow at once."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusion_model.encoders.inputs import EncoderInput
from fusion_model.prefixes.planner import PrefixPlanner


class PrefixStream:
    """Embeddings of growing token sequences: beams, sampled batches, users' streams.

    Sequences need not be announced: each step names the tokens of those that go on, in any order,
    and all their new prefixes go to the encoder as one batch. Under policy `incremental` what was
    computed for a sequence's earlier tokens, or for any other sequence that begins alike, is used
    again. Memory is bounded; what was not used for longest goes first and is computed again if
    needed.

    Args:
        planner: what to encode; its view must be one of `CAUSAL_VIEWS`.
        size: most vectors kept.
    """

    def __init__(self, planner: PrefixPlanner, size: int = 65_536) -> None:
        self._planner, self._size = planner, size
        self._vectors: OrderedDict[EncoderInput, Any] = OrderedDict()
        stream = getattr(planner.encoder, "stream", None)
        self._encode = stream().encode if stream else planner.encoder.encode

    def step(self, rows: Sequence[Sequence[int]]) -> list[Any]:
        """The vector [E] of each row: of the prefix that ends with its last token.

        Args:
            rows: token ids; special tokens are not part of the text.
        """
        return self.of_rows(rows, -1)

    def of_rows(self, rows: Sequence[Sequence[int]], start: int) -> list[Any]:
        """Vectors [E] of the prefixes that end at tokens start..T-1, row after row.

        Args:
            rows: token ids; special tokens are not part of the text.
            start: counted from the end where negative: then rows may differ in length.
        """
        special = set(self._planner.special_ids)
        inputs: list[EncoderInput] = []
        for row in rows:
            counts = np.cumsum([token not in special for token in row])[start:]
            of_row = self._planner.last_inputs(row, counts[0])
            inputs += [of_row[count - counts[0]] for count in counts]
        new = list(dict.fromkeys(given for given in inputs if given not in self._vectors))
        if new:
            self._vectors.update(zip(new, self._encode(new), strict=True))
        for given in inputs:
            self._vectors.move_to_end(given)
        vectors = [self._vectors[given] for given in inputs]
        while len(self._vectors) > self._size:
            self._vectors.popitem(last=False)
        return vectors
