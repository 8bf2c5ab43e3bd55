"""Texts that grow, each new token encoded once. Nothing here needs PyTorch."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from fusion_model.encoders.incremental.cache import MAX_BYTES, Array, Entry, TextCache
from fusion_model.encoders.incremental.trees import Tree, similar_sizes
from fusion_model.encoders.inputs import EncoderInput
from fusion_model.encoders.pooling import Pooling


class Growing(Protocol):
    """An encoder that goes on from cached texts."""

    after: int
    read: list[Pooling]

    @property
    def budget(self) -> int:
        """Most nodes at once."""

    def split(self, given: EncoderInput) -> tuple[list[int], list[int]]:
        """The head, with special tokens, and the tokens after it."""

    def empty(self) -> tuple[Array, Array]:
        """States and sums of a text without nodes; see `cache.Entry`."""

    def run(self, trees: Sequence[Tree], entries: Sequence[Entry]) -> Array:
        """What the poolings besides `static` read, tree after tree, [texts, P E] on the CPU."""

    def with_static(self, inputs: Sequence[EncoderInput], read: Array) -> Any:
        """Vectors [N, dim] of what was read of them, and of `static`."""


class Stream:
    """Encodes texts that grow, each new token once.

    Args:
        encoder: encodes.
        max_bytes: most memory that is held between steps.

    Attributes:
        cache: what is held.
    """

    def __init__(self, encoder: Growing, max_bytes: int = MAX_BYTES) -> None:
        self._encoder = encoder
        self.cache = TextCache(*encoder.empty(), max_bytes)

    def encode(self, inputs: Sequence[EncoderInput]) -> Array:
        """Vectors [len(inputs), dim] float32 on the CPU, without repeating what is held."""
        encoder = self._encoder
        texts = [encoder.split(given) for given in inputs] if encoder.read else []
        read = np.empty((len(inputs), 0), dtype=np.float32)
        try:
            planned, entries = self._planned(texts)
            for rows, trees in similar_sizes(planned, encoder.budget):
                found = encoder.run(trees, [entries[id(tree)] for tree in trees])
                if not read.size:
                    read = np.empty((len(inputs), found.shape[1]), dtype=np.float32)
                read[rows] = found
        except BaseException:
            self.cache.entries.clear()  # some tokens are noted that nothing was computed of
            raise
        self.cache.evict()
        return encoder.with_static(inputs, read)

    def _planned(
        self, texts: Sequence[tuple[list[int], list[int]]]
    ) -> tuple[list[tuple[list[int], Tree]], dict[int, Entry]]:
        """The path of what is new of each text, with the text's place; and each path's entry.

        A text's last node is always new: only then is there a vector of it.
        """
        found = [
            self.cache.find(head, tail[:-1]) if tail else (None, -1) for head, tail in texts
        ]  # all of them before any entry is written on
        planned: list[tuple[list[int], Tree]] = []
        entries: dict[int, Entry] = {}
        taken: set[Entry] = set()
        for row, ((head, tail), (source, held)) in enumerate(zip(texts, found, strict=True)):
            known, depth = max(held, 0), len(head) - self._encoder.after
            past = [*range(len(head)), *range(depth, depth + known)] if source else []
            tree = Tree([] if source else head, past, depth + known)
            tree.add(tail[known:])
            entry = self.cache.take(source, head, tail[:known], fork=source in taken)
            taken.add(entry)
            entry.tail = tail
            entry.make_room(len(head) + len(tail))
            planned.append(([row], tree))
            entries[id(tree)] = entry
        return planned, entries
