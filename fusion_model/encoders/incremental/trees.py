"""Texts that begin alike as one tree of tokens: each node is encoded once. Needs no PyTorch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

NODES_PER_TREE = 512


class Query(NamedTuple):
    """A node that sees a text, and that none sees: a pooling reads it.

    Attributes:
        token: its token.
        at_start: it takes position 0, not the one after the text.
        own: where the node stands in a head that serves in its place, where a text is its head
            alone; None if none does.
    """

    token: int
    at_start: bool
    own: int | None


@dataclass(frozen=True)
class FlatTree:
    """A tree's nodes: the head, the others, then the queries.

    Attributes:
        tokens, positions: of each node, [L].
        sees: [L, L] bool, besides the past: which nodes (columns) each node reads.
        nodes: for `mean` and `last`, and each query, the node of each text that is read:
            for `mean` the one that sees all of the text, for `last` that of its last token.
    """

    tokens: list[int]
    positions: list[int]
    sees: np.ndarray
    nodes: dict[str, list[int]]


@dataclass
class Tree:
    """New nodes of texts that begin alike.

    Attributes:
        head: tokens that see one another, and that all later nodes see; none where there is a
            past.
        past: positions of nodes that were computed before; every node sees them all.
        depth: position of the first node after the head or the past.
        tokens, parents: of each node; parent -1 is the head or the past.
        ends: the node that each text ends at, -1 for the head's own.
    """

    head: list[int]
    past: list[int]
    depth: int
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)
    _latest: tuple[list[int], int] = ([], -1)

    def __len__(self) -> int:
        return len(self.head) + len(self.tokens)

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

    def add(self, tail: list[int]) -> bool:
        """Add a text that goes on from the head or the past with these tokens.

        Returns:
            False, with nothing added, where it begins otherwise than the others, or the tree is
            full.
        """
        count, node = self.find(tail)
        full = len(self.tokens) + len(tail) - count > NODES_PER_TREE
        if self.ends and (full or (self.tokens and 2 * count < len(tail))):
            return False
        for token in tail[count:]:
            self._children[node, token] = len(self.tokens)
            self.tokens.append(token)
            self.parents.append(node)
            node = len(self.tokens) - 1
        self.ends.append(node)
        self._latest = tail, node
        return True

    def _depths(self) -> list[int]:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(self.depth if parent < 0 else depths[parent] + 1)
        return depths

    def flat(self, queries: Mapping[str, Query], after: int) -> FlatTree:
        """All that is computed of this tree.

        Args:
            queries: by pooling.
            after: special tokens at the head's end.
        """
        head, depths, query_ends = len(self.head), self._depths(), []
        tokens, positions = [*self.head, *self.tokens], [*range(head), *depths]
        nodes = {"mean": [head + end for end in self.ends]}
        nodes["last"] = [node - after * (node < head) for node in nodes["mean"]]
        for name, query in queries.items():
            nodes[name] = []
            for end in self.ends:
                if end < 0 and query.own is not None:
                    nodes[name].append(range(head)[query.own])
                    continue
                nodes[name].append(len(tokens))
                place = depths[end] + 1 if end >= 0 else self.depth
                tokens.append(query.token)
                positions.append(0 if query.at_start else place)
                query_ends.append(end)
        sees = np.zeros((len(tokens), len(tokens)), dtype=bool)
        sees[:, :head] = True
        np.fill_diagonal(sees, True)
        for node, parent in enumerate([*self.parents, *query_ends], start=head):
            if parent >= 0:
                sees[node] |= sees[head + parent]
        return FlatTree(tokens, positions, sees, nodes)


def grow_trees(
    texts: Sequence[tuple[list[int], list[int]]], after: int
) -> Iterator[tuple[list[int], Tree]]:
    """Trees, each with the places of its texts; neighbours that begin alike share one.

    Args:
        texts: head and tail of each.
        after: special tokens at a head's end, whose positions the next tokens take.
    """
    tree: Tree | None = None
    rows: list[int] = []
    for row, (head, tail) in enumerate(texts):
        if tree is None or tree.head != head or not tree.add(tail):
            if tree is not None:
                yield rows, tree
            tree, rows = Tree(head, [], len(head) - after), []
            tree.add(tail)
        rows.append(row)
    if tree is not None:
        yield rows, tree


def similar_sizes(
    trees: Iterable[tuple[list[int], Tree]], budget: int, padded: bool = False
) -> Iterator[tuple[list[int], list[Tree]]]:
    """Batches of up to `budget` nodes, or one tree, largest first, with the places of their texts.

    Args:
        padded: each tree of a batch takes as many nodes as its largest.
    """
    rows: list[int] = []
    batch: list[Tree] = []
    size = 0
    for places, tree in sorted(trees, key=lambda pair: -len(pair[1])):
        own = len(batch[0]) if batch and padded else len(tree)
        if batch and (size + own > budget or 4 * len(tree) < 3 * own - 16):
            yield rows, batch
            rows, batch, size, own = [], [], 0, len(tree)
        rows += places
        batch.append(tree)
        size += own
    if batch:
        yield rows, batch
