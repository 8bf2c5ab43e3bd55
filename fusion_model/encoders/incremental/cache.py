"""Keys, values and running sums of encoded texts, so that they can grow.

An entry is one text. A text that goes on takes its entry along, one that forks copies what it
shares. Memory is bounded: the entries used least lately go first, and are computed again if needed.

Notation: as in `fusion_model.encoders.layers`.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

MAX_BYTES = 256 * 2**20
WORD = 8  # nodes that are given up in place: most likely a word that is now split otherwise


@dataclass(eq=False)
class Entry:
    """What is held of one text.

    Attributes:
        head, tail: its tokens; the head's with special tokens.
        states: keys, then values, of each layer, [2 * depth, room, A, d].
        sums: of each `mean` layer, over all up to each node, [room, means, E] float32.
    """

    head: list[int]
    tail: list[int]
    states: Tensor
    sums: Tensor

    def make_room(self, size: int) -> None:
        """For so many nodes."""
        room = len(self.sums)
        if size > room:
            more = max(size, 2 * room) - room
            self.states = F.pad(self.states, (0, 0, 0, 0, 0, more))
            self.sums = F.pad(self.sums, (0, 0, 0, 0, 0, more))

    def copy(self, tail: list[int]) -> "Entry":
        """With the head and these first tokens of the tail."""
        end = len(self.head) + len(tail)
        return Entry(self.head, tail, self.states[:, :end].clone(), self.sums[:end].clone())


class TextCache:
    """The texts used last.

    Args:
        states, sums: of a text without nodes.
        max_bytes: most memory for all, between steps.

    Attributes:
        entries: the latest used last.
    """

    def __init__(self, states: Tensor, sums: Tensor, max_bytes: int = MAX_BYTES) -> None:
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


def common(a: list[int], b: list[int]) -> int:
    """With how many tokens both begin."""
    low, high = 0, min(len(a), len(b)) + 1
    while high - low > 1:  # a[:low] == b[:low], and not so at high
        middle = (low + high) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle)
    return low
