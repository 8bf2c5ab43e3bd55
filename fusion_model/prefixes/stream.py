"""Prefix embeddings of many texts that grow at once."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusion_model import progress
from fusion_model.encoders.inputs import EncoderInput
from fusion_model.prefixes.growing import GrowingInputs, Grown, can_grow
from fusion_model.prefixes.planner import PrefixPlanner

TEXTS = 4096  # latest rows that may go on


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
        self._growing = GrowingInputs(planner) if can_grow(planner) else None
        self._texts: OrderedDict[tuple[int, ...], Grown] = OrderedDict()
        stream = getattr(planner.encoder, "stream", None)
        self._noted = False
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
        of_rows = self.inputs(rows, start)
        inputs = [given for of_row in of_rows for given in of_row]
        new = dict.fromkeys(given for given in inputs if given not in self._vectors)
        ends = [given for given in dict.fromkeys(of_row[-1] for of_row in of_rows) if given in new]
        within = [given for given in new if given not in set(ends)]
        for some, encode in ((within, self._planner.encoder.encode), (ends, self._encode)):
            if some:
                self._vectors.update(zip(some, encode(some), strict=True))
        for given in inputs:
            self._vectors.move_to_end(given)
        vectors = [self._vectors[given] for given in inputs]
        while len(self._vectors) > self._size:
            self._vectors.popitem(last=False)
        return vectors

    def inputs(self, rows: Sequence[Sequence[int]], start: int) -> list[list[EncoderInput]]:
        """What `of_rows` encodes for each row."""
        found = [self.inputs_of(tuple(row), range(len(row))[start:]) for row in rows]
        if self._planner.outgrown and not self._noted:
            progress.note("the text outgrows the encoder's window: it sees the last part only")
            self._noted = True
        self._planner.outgrown.clear()
        while len(self._texts) > TEXTS:
            self._texts.popitem(last=False)
        return found

    def inputs_of(self, row: tuple[int, ...], wanted: range) -> list[EncoderInput]:
        """What the prefixes that end at these tokens need."""
        if self._growing is None:
            special = set(self._planner.special_ids)
            counts = np.cumsum([token not in special for token in row])[wanted]
            of_row = self._planner.last_inputs(row, counts[0])
            return [of_row[count - counts[0]] for count in counts]
        text = self._texts.get(row[:-1]) if len(wanted) == 1 else None
        first = 0 if text is None else len(row) - 1
        text, found = text or Grown(), []
        for at in range(first, len(row)):
            text = self._growing.grown(text, row[at])
            if at in wanted:
                found.append(self._growing.input(text))
        self._texts[row] = text
        return found
