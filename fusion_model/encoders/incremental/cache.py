"""Keys, values and running sums of encoded texts, so that they can grow.

An entry is one text. A text that goes on takes its entry along, one that forks copies what it
shares. Memory is bounded: the entries used least lately go first, and are computed again if needed.

Notation: as in `fusion_model.encoders.layers`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any
"""PyTorch's or NumPy's."""

MAX_BYTES = 256 * 2**20
WORD = 8  # nodes that are given up in place: most likely a word that is now split otherwise


@dataclass(eq=False)
class Entry:
    """What is held of one text.

    Attributes:
        head, tail: its tokens; the head's with special tokens.
        states: keys, then values, of each layer, [2 * depth, room, …].
        sums: of each `mean` layer, over all up to each node, [room, means, E] float32.
    """

    head: list[int]
    tail: list[int]
    states: Array
    sums: Array

    def make_room(self, size: int) -> None:
        """For so many nodes."""
        room = len(self.sums)
        if size > room:
            more = max(size, 2 * room)
            self.states, self.sums = grown(self.states, 1, more), grown(self.sums, 0, more)

    def copy(self, tail: list[int]) -> "Entry":
        """With the head and these first tokens of the tail."""
        end = len(self.head) + len(tail)
        states, sums = grown(self.states[:, :end], 1, end), grown(self.sums[:end], 0, end)
        return Entry(self.head, tail, states, sums)


class TextCache:
    """The texts used last.

    Args:
        states, sums: of a text without nodes.
        max_bytes: most memory for all, between steps.

    Attributes:
        entries: the latest used last.
    """

    def __init__(self, states: Array, sums: Array, max_bytes: int = MAX_BYTES) -> None:
        self._states, self._sums, self._max_bytes = states, sums, max_bytes
        self.entries: list[Entry] = []

    @property
    def nbytes(self) -> int:
        """What all entries take."""
        return sum(entry.states.nbytes + entry.sums.nbytes for entry in self.entries)

    def find(self, head: list[int], tail: list[int]) -> tuple[Entry | None, int]:
        """The entry that begins with most of a text, and with how much of its tail; -1 if none
        begins with its head. Among equals it is one that ends there."""
        best, most = None, -1
        for entry in reversed(self.entries):
            if entry.head == head and entry.tail[: max(most, 0)] == tail[: max(most, 0)]:
                held = common(entry.tail, tail)
                if held > most or len(entry.tail) == held:
                    best, most = entry, held
        return best, most

    def take(self, source: Entry | None, head: list[int], tail: list[int], fork: bool) -> Entry:
        """The entry of a text with this head and tail, to be written on behind them.

        Args:
            source: begins with both; None for a text of which nothing is held.
            fork: `source` is taken already.
        """
        if source is None:
            entry = Entry(head, [], self._states, self._sums)
        elif fork or len(source.tail) - len(tail) > WORD:
            entry = source.copy(tail)
        else:
            entry, entry.tail = source, tail
            self.entries.remove(entry)
        self.entries.append(entry)
        return entry

    def evict(self) -> None:
        """Give up what was not used for longest."""
        total = self.nbytes
        while total > self._max_bytes:
            gone = self.entries.pop(0)
            total -= gone.states.nbytes + gone.sums.nbytes


def grown(array: Array, axis: int, size: int) -> Array:
    """A copy with room for so many along an axis."""
    shape = [*array.shape[:axis], size, *array.shape[axis + 1 :]]
    new = array.new_zeros(shape) if hasattr(array, "new_zeros") else np.zeros(shape, array.dtype)
    new[(*[slice(None)] * axis, slice(array.shape[axis]))] = array
    return new


def common(a: list[int], b: list[int]) -> int:
    """With how many tokens both begin."""
    low, high = 0, min(len(a), len(b)) + 1
    while high - low > 1:  # a[:low] == b[:low], and not so at high
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
