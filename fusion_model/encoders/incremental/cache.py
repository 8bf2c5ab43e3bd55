"""Keys, values and running sums of encoded tokens, so that texts can grow in any order.

Nodes form a forest: texts that begin alike share them, whoever asked first. Sequences so join,
leave and fork at any step without being named. Memory is bounded: the nodes that were used least
lately go first, and are computed again if needed.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fusion_model.encoders.graphs import Graphs
from fusion_model.encoders.incremental.trees import Tree, similar_sizes
from fusion_model.encoders.transfers import sent

if TYPE_CHECKING:
    from fusion_model.encoders.incremental.encoder import IncrementalEncoder

MAX_BYTES = 256 * 2**20
ROOT = -1
SHORT = 16  # nodes of a head that is copied, so that more than one text lies in a row with it
WORD = 8  # nodes

Text = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens of the head, and those after it."""


class NodePool:
    """What an `IncrementalEncoder` has computed so far.

    Args:
        encoder: encodes.
        max_bytes: most memory for keys, values and sums.

    Attributes:
        keys, values: of each layer, [slots, A, d].
        sums: of each `mean` layer over the path to the node, [slots, layers, E] float32.
        positions: of each node, [slots].
        graphs: replay steps, which write here; None for plain passes only.
    """

    def __init__(self, encoder: "IncrementalEncoder", max_bytes: int = MAX_BYTES) -> None:
        self._encoder = encoder
        layers, model = encoder.layers, encoder.model
        width = model.config.hidden_size
        depth = encoder.deepest
        size = 2 * depth * width * model.dtype.itemsize + 4 * width * len(encoder.means) + 64
        self.capacity = max(max_bytes // size, 1)
        heads, device = layers.heads, model.device

        def room(*shape: int, dtype: torch.dtype = model.dtype) -> Tensor:
            # Not zeros: memory that is never used is never touched. Slot 0 stands in for padding.
            found = torch.empty(self.capacity, *shape, dtype=dtype, device=device)
            found[:1] = 0
            return found

        self.keys = [room(heads, width // heads) for _ in range(depth)]
        self.values = [room(heads, width // heads) for _ in range(depth)]
        self.sums = room(len(encoder.means), width, dtype=torch.float32)
        self.positions = room(dtype=torch.int64)
        self.graphs = Graphs() if device.type == "cuda" else None
        self._forget()
        self._step = 0

    def _forget(self) -> None:
        """Hold nothing."""
        self._is_free = np.ones(self.capacity, dtype=bool)
        self._children: dict[tuple[int, int], int] = {}  # (parent's slot, token) -> slot
        self._origin: dict[int, tuple[int, int]] = {}  # the reverse
        self._heads: dict[tuple[int, ...], list[int]] = {}
        self._below: dict[int, list[int]] = {}  # slot -> its children's
        self._copies: dict[int, list[int]] = {}  # first node after a head -> the head's copy
        self._paths: dict[Text, list[int]] = {}  # slots of the texts of the latest step
        self._used = np.zeros(self.capacity, dtype=np.int64)  # the step of the latest use

    def __len__(self) -> int:
        """Nodes held."""
        return self.capacity - int(self._is_free.sum())

    def encode(self, items: Sequence[bytes]) -> Tensor:
        """Vectors [len(items), dim] float32 on the CPU, without repeating what is held."""
        self._step += 1
        encoder = self._encoder
        out = torch.empty(len(items), encoder.dim)
        texts = [encoder.parse(item) for item in items]
        planned = self._planned(texts)
        try:
            for places, trees in similar_sizes(iter(planned), encoder.budget):
                self._give_slots(trees)
                out[places] = encoder.run(trees, self).float().cpu()
        except BaseException:
            self._forget()  # slots were given that nothing was written to
            raise
        self._paths = dict(self._ended(planned, texts))
        return out

    def _planned(
        self, texts: Sequence[tuple[list[int], list[int]]]
    ) -> list[tuple[list[int], Tree]]:
        """One tree for the new nodes below each place where what is held ends.

        A text's last node is always new: only then is there a vector of it.
        """
        found: dict[tuple[tuple[int, ...], int], tuple[list[int], Tree]] = {}
        after = self._encoder.after
        for row, (head, tail) in enumerate(texts):
            path = self._walk(tuple(head), tail) if tail else []
            count = len(path) - len(head) if path else 0
            key = (tuple(head), path[-1] if path else ROOT)
            if key not in found:
                depth = len(head) - after + count
                found[key] = [], Tree([] if path else head, path, depth)
            rows, tree = found[key]
            tree.add(tail[count:])
            rows.append(row)
        return list(found.values())

    def _walk(self, head: tuple[int, ...], tail: list[int]) -> list[int]:
        """Slots of what is held of a text, its last token aside; stamped as used."""
        path = self._paths.get((head, tuple(tail[:-1])))  # most texts go on by one token
        if path is None:
            path = list(self._heads.get(head, ()))
            while path and len(path) - len(head) < len(tail) - 1:
                slot = self._children.get((path[-1], tail[len(path) - len(head)]))
                if slot is None:
                    break
                path.append(slot)
            path = self._beside_its_head(path, len(head))
        if path:
            self._used[path] = self._used[self._heads[head]] = self._step
        return path

    def _beside_its_head(self, path: list[int], head: int) -> list[int]:
        copy = self._copies.get(path[head]) if len(path) > head else None
        return path if copy is None else [*copy, *path[head:]]

    def _ended(
        self,
        planned: Sequence[tuple[list[int], Tree]],
        texts: Sequence[tuple[list[int], list[int]]],
    ) -> Iterator[tuple[Text, list[int]]]:
        """Texts of this step that are held, with their slots."""
        for rows, tree in planned:
            if not tree.slots:
                continue
            base, own = len(tree.head), [*tree.past, *tree.slots[: len(tree.head)]]
            for row, end in zip(rows, tree.ends, strict=True):
                below = []
                while end >= 0:
                    below.append(tree.slots[base + end])
                    end = tree.parents[end]
                head, tail = texts[row]
                yield (
                    (tuple(head), tuple(tail)),
                    self._beside_its_head([*own, *reversed(below)], len(head)),
                )

    def _give_slots(self, trees: Sequence[Tree]) -> None:
        """Slots for the new nodes, if need be of nodes that no text of this step has used."""
        free = self.capacity - len(self)
        new = sum(map(len, trees))
        if new > free:
            self._evict(new - free)
        for tree in trees:
            if len(tree) > self.capacity - len(self):
                continue  # it is computed all the same, and not held
            own: list[int] = []
            if tree.head:
                if tuple(tree.head) in self._heads:
                    continue
                for _ in tree.head:
                    own.append(self._take(own[-1] if own else None))
                self._heads[tuple(tree.head)] = own
            start = own or list(tree.past)
            placed = [ROOT] * len(tree.tokens)
            for node in tree.deepest_first():
                parent = tree.parents[node]
                origin = (placed[parent] if parent >= 0 else start[-1], tree.tokens[node])
                slot = self._children.get(origin)
                if slot is None:
                    self._drop_word(origin[0] + 1)
                    copy = self._copy(tree, start) if parent < 0 else []
                    slot = self._take(copy[-1] if copy else origin[0])
                    self._children[origin], self._origin[slot] = slot, origin
                    self._below.setdefault(origin[0], []).append(slot)
                    self._used[slot] = self._step
                    if copy:
                        self._copies[slot] = copy
                placed[node] = slot
            tree.slots = own + placed
            self._used[tree.slots] = self._step

    def _take(self, before: int | None) -> int:
        """A free slot: the one after this, so that a sequence lies in a row, or a new row's."""
        slot = self.capacity if before is None else before + 1
        if slot >= self.capacity or not self._is_free[slot]:
            first, end = self._largest_gap()
            alone = end - first == self.capacity
            slot = first if alone else (first + end) // 2  # the row before may grow, too
        self._is_free[slot] = False
        return slot

    def _largest_gap(self) -> tuple[int, int]:
        edges = np.flatnonzero(np.diff(self._is_free, prepend=False, append=False))
        gaps = edges.reshape(-1, 2)
        first, end = gaps[np.argmax(gaps[:, 1] - gaps[:, 0])]
        return int(first), int(end)

    def _drop_word(self, slot: int) -> None:
        """Free a few nodes that no text of this step has used: most likely a word that was cut
        here and is now split otherwise, whose place in the row the new node can have."""
        if slot not in self._origin:
            return
        found = [slot]
        for below in found:
            found += self._below.get(below, ())
            if len(found) > WORD or self._used[below] == self._step:
                return
        self._free(found)

    def _copy(self, tree: Tree, head: list[int]) -> list[int]:
        """A short head's copy in a row of its own, where another text follows on the head itself.

        Args:
            head: the head's slots, or a longer past, of which none is made.
        """
        if len(head) > SHORT or (not tree.head and head not in self._heads.values()):
            return []
        after = head[-1] + 1
        first, end = self._largest_gap()
        start = (first + end) // 2
        fits = end - start > len(head) and self.capacity - len(self) >= len(head) + len(tree)
        if not fits or (after < self.capacity and self._is_free[after]):
            return []
        copy = list(range(start, start + len(head)))
        self._is_free[copy] = False
        self._used[copy] = self._step
        if tree.head:  # which this pass computes
            tree.copies += zip(copy, range(len(head)), strict=True)
        else:
            for rows in (*self.keys, *self.values, self.sums, self.positions):
                rows[copy] = rows[head]
        return copy

    def _evict(self, wanted: int) -> None:
        """Free at least this many slots, or all that this step does not use.

        Whoever uses a node uses those before it: a node is never older than its children.
        """
        held = np.flatnonzero(~self._is_free)
        stamps = np.sort(self._used[held])
        limit = min(stamps[min(wanted, len(stamps)) - 1], self._step - 1)
        self._free(held[self._used[held] <= limit].tolist())

    def _free(self, gone: Sequence[int]) -> None:
        """Forget nodes, those below them among these."""
        self._is_free[gone] = True
        lost = set(gone)
        self._heads = {k: slots for k, slots in self._heads.items() if slots[0] not in lost}
        for slot in gone:
            self._is_free[self._copies.pop(slot, [])] = True
            self._below.pop(slot, None)
            origin = self._origin.pop(slot, None)
            if origin is not None:
                del self._children[origin]
                if origin[0] in self._below:
                    self._below[origin[0]].remove(slot)

    def targets(self, trees: Sequence[Tree], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Slots of all nodes of trees that have some, and where in the pass these nodes are.

        Args:
            starts: the first node of each tree.
        """
        placed = [
            (slot, start + node)
            for tree, start in zip(trees, starts, strict=True)
            for slot, node in (*zip(tree.slots, range(len(tree.slots)), strict=True), *tree.copies)
        ]
        slots, nodes = zip(*placed, strict=True) if placed else ((), ())
        device = self.positions.device
        return (
            sent(torch.tensor(slots, dtype=torch.int64), device),
            sent(torch.tensor(nodes, dtype=torch.int64), device),
        )
