"""Texts that begin alike as one tree of tokens: each node is encoded once. Needs no PyTorch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

NODES_PER_TREE = 512


@dataclass
class Tree:
    """New nodes of texts that begin alike.

    Attributes:
        head: tokens that see one another, and that all later nodes see; empty where `past` is not.
        past: slots of nodes that were computed before; every node sees them all.
        depth: position of the first node after the head or the past.
        tokens, parents: of each node; parent -1 is the head or the past.
        ends: the node that each text ends at, -1 for the head's own.
        slots: where head and nodes are to be kept, if they are.
        copies: (slot, node) of further places.
    """

    head: list[int]
    past: list[int]
    depth: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)
    _latest: tuple[list[int], int] = ([], -1)

    def find(self, tail: list[int]) -> tuple[int, int]:
        """How many of these tokens, from the first on, are there already; the last one's node."""
        count, node = 0, -1
        latest, end = self._latest
        if tail[: len(latest)] == latest:  # most texts go on from the one before
            count, node = len(latest), end
        while count < len(tail):
            found = self._children.get((node, tail[count]))
            if found is None:
                break
            count, node = count + 1, found
        return count, node

    def add(self, tail: list[int], found: tuple[int, int] | None = None) -> None:
        """A text that goes on from the head or the past with these tokens.

        Args:
            found: what `find` says, if it was asked.
        """
        count, node = found or self.find(tail)
        for token in tail[count:]:
            self._children[node, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            node = len(self.tokens) - 1
        self.ends.append(node)
        self._latest = tail, node

    def deepest_first(self) -> Iterator[int]:
        """All nodes, parents first, each followed by its child with the longest text below."""
        height = [0] * len(self.tokens)
        below: dict[int, list[int]] = {}
        for node in reversed(range(len(self.tokens))):
            parent = self.parents[node]
            below.setdefault(parent, []).append(node)
            if parent >= 0:
                height[parent] = max(height[parent], height[node] + 1)
        waiting = sorted(below.get(-1, ()), key=lambda node: height[node])
        while waiting:
            node = waiting.pop()
            yield node
            waiting += sorted(below.get(node, ()), key=lambda child: height[child])

    def __len__(self) -> int:
        return len(self.head) + len(self.tokens)

    def grid(self, queries: Sequence[tuple[int, bool]]) -> "Grid":
        """All that is computed of this tree.

        Args:
            queries: for each, its token, and whether its position is 0 or that after the text.
        """
        head, size = len(self.head), len(self) + len(queries) * len(self.ends)
        sees = np.zeros((size, size), dtype=bool)
        sees[:, :head] = True
        np.fill_diagonal(sees, True)
        depths: list[int] = []
        for node, parent in enumerate(self.parents):
            depths.append(self.depth if parent < 0 else depths[parent] + 1)
            if parent >= 0:
                sees[head + node] |= sees[head + parent]
        tokens, positions = [*self.head, *self.tokens], [*range(head), *depths]
        for token, at_start in queries:
            for end in self.ends:
                if end >= 0:
                    sees[len(tokens)] |= sees[head + end]
                tokens.append(token)
                positions.append(0 if at_start else self.depth if end < 0 else depths[end] + 1)
        return Grid(tokens, positions, sees)


@dataclass(frozen=True)
class Grid:
    """A tree's nodes: the head, the others, then for each query one node a text.

    Attributes:
        tokens, positions: of each node.
        sees: [L, L] bool, besides the past: which nodes (columns) each node reads.
    """

    tokens: list[int]
    positions: list[int]
    sees: np.ndarray


def grow_trees(
    texts: Sequence[tuple[list[int], list[int]]], depth: int
) -> Iterator[tuple[list[int], Tree]]:
    """Trees, each with the places of its texts; neighbours that begin alike share one.

    Args:
        texts: head and tail of each.
        depth: special tokens at a head's end, whose positions the next tokens take.
    """
    tree: Tree | None = None
    rows: list[int] = []
    for row, (head, tail) in enumerate(texts):
        found = (0, -1)
        if tree is not None:
            found = tree.find(tail)
            shared = found[0]
            apart = tree.tokens and 2 * shared < len(tail)
            full = len(tree.tokens) + len(tail) - shared > NODES_PER_TREE
            if apart or full or tree.head != head:
                yield rows, tree
                tree, found = None, (0, -1)
        if tree is None:
            tree, rows = Tree(head, [], len(head) - depth), []
        tree.add(tail, found)
        rows.append(row)
    if tree is not None:
        yield rows, tree


def similar_sizes(
    trees: Iterator[tuple[list[int], Tree]], budget: int
) -> Iterator[tuple[list[int], list[Tree]]]:
    """Batches of up to `budget` nodes, largest trees first, with the places of their texts."""
    rows: list[int] = []
    batch: list[Tree] = []
    size = 0
    for places, tree in sorted(trees, key=lambda pair: -len(pair[1]) - len(pair[1].past)):
        if batch and size + len(tree) > budget:
            yield rows, batch
            rows, batch, size = [], [], 0
        rows += places
        batch.append(tree)
        size += len(tree)
    if batch:
        yield rows, batch
