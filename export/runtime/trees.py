"""A pretrained encoder over trees of nodes (`fusion_model.export.graphs.incremental`), in NumPy.

Notation: N trees of up to L nodes, P nodes of the past each, K layers, E width, R poolings that
are read (all but `static`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from fusion_model.export.manifest import ENCODER_WEIGHTS
from fusion_model.export.runtime.encoder import OnnxEncoder, Rows

from fusion_model.encoders.incremental.cache import Entry
from fusion_model.encoders.incremental.stream import Stream
from fusion_model.encoders.incremental.trees import FlatTree, Tree, grow_trees, similar_sizes
from fusion_model.encoders.inputs import EncoderInput
from fusion_model.encoders.policies import parse_policy
from fusion_model.encoders.pooling import Pooling, read_of


class TreeEncoder(OnnxEncoder):
    """Exact and incremental texts, whole or as they grow; see `OnnxEncoder`."""

    tokens_at_once: ClassVar = {"cpu": 2048, "cuda": 65536}  # nodes

    def __init__(self, folder: Path, described: dict[str, Any], device: str, threads: int) -> None:
        super().__init__(folder, described, device, threads)
        self.read = read_of(self.poolings, described["depth"])
        self._width = self.dim // len(self.poolings)
        self._read_width = len(self.read) * self._width
        self._deepest = max((p.layer for p in self.read), default=0)
        names = {p.name for p in self.read}
        self._queries = {name: query for name, query in self.queries.items() if name in names}
        self._means = sorted({p.layer for p in self.read if p.name == "mean"})
        shape = described["vocabulary"], self._width
        weights = folder / ENCODER_WEIGHTS
        self._words = np.memmap(weights, "<f4", "r", described["words"], shape)
        self._incremental = parse_policy(self.policy).name == "incremental"
        if self._incremental:
            self.stream = lambda: Stream(self)

    @property
    def fingerprint(self) -> str:
        """As that of PyTorch's encoders."""
        return super().fingerprint + (":incremental" if self._incremental else "")

    def _batches(self, inputs: Sequence[EncoderInput]) -> Rows:
        texts = [self.split(given) for given in inputs] if self.read else []
        for rows, trees in similar_sizes(grow_trees(texts, self.after), self.budget, padded=True):
            yield rows, self.run(trees)

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """States [2 K, 0, E] and sums [0, means, E] of a text without nodes."""
        states = np.zeros((2 * self._deepest, 0, self._width), dtype=np.float32)
        return states, np.zeros((0, len(self._means), self._width), dtype=np.float32)

    def with_static(self, inputs: Sequence[EncoderInput], read: np.ndarray) -> np.ndarray:
        """Vectors [N, dim] of what was `read` of them, [N, R E], and of `static`."""
        if len(self.read) == len(self.poolings):
            return read
        static = self._words[np.frombuffer(b"".join(map(self.last_id, inputs)), dtype="<i4")]
        parts = iter(np.split(read, max(len(self.read), 1), axis=1))
        columns = [static if p.name == "static" else next(parts) for p in self.poolings]
        return np.concatenate(columns, axis=1)

    def run(self, trees: Sequence[Tree], entries: Sequence[Entry] = ()) -> np.ndarray:
        """What the poolings read of the trees' texts, tree after tree, [texts, R E].

        Args:
            entries: the cached text that each tree, a path, goes on from, and that gets its nodes.
        """
        flats = [tree.flat(self._queries, self.after) for tree in trees]
        pasts = [
            entry.states[:, : len(tree.past)] for tree, entry in zip(trees, entries, strict=False)
        ]
        names = sorted({_output(p) for p in self.read} | ({"states"} if entries else set()))
        feed = self._feed(trees, flats, pasts)
        found = dict(zip(names, self._session.run(names, feed), strict=True))
        rows = []
        for i, (tree, flat) in enumerate(zip(trees, flats, strict=True)):
            entry, past = entries[i] if entries else None, len(tree.past)
            kept, held = slice(len(tree)), slice(past, past + len(tree))
            if entry is not None:
                entry.states[:, held] = found["states"][:, i, kept]
            columns = []
            for p in self.read:
                output, nodes = found[_output(p)][i], flat.nodes[p.name]
                if p.name != "mean":
                    columns.append(output[nodes])
                    continue
                total = flat.sees @ output[: len(flat.tokens)]
                if entry is not None:
                    layer = self._means.index(p.layer)
                    total += entry.sums[past - 1, layer] if past else 0
                    entry.sums[held, layer] = total[kept]
                count = flat.sees[nodes].sum(axis=1, keepdims=True) + past
                columns.append(total[nodes] / count)
            rows.append(np.concatenate(columns, axis=1))
        return np.concatenate(rows).astype(np.float32, copy=False)

    def _feed(
        self, trees: Sequence[Tree], flats: Sequence[FlatTree], pasts: Sequence[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The graph's inputs; what lies behind a tree's nodes is padding that nothing reads."""
        count, most = len(flats), max((len(flat.tokens) for flat in flats), default=0)
        behind = max((past.shape[1] for past in pasts), default=0)
        ids, positions = np.zeros((2, count, most), dtype=np.int64)
        seen_positions = np.zeros((count, behind + most), dtype=np.int64)
        sees = np.zeros((count, most, behind + most), dtype=bool)
        past = np.zeros((2 * self._deepest, count, behind, self._width), dtype=np.float32)
        for i, flat in enumerate(flats):
            size = len(flat.tokens)
            ids[i, :size], positions[i, :size] = flat.tokens, flat.positions
            sees[i, :size, behind : behind + size] = flat.sees
            if i < len(pasts):
                held = pasts[i].shape[1]
                past[:, i, :held], sees[i, :size, :held] = pasts[i], True
                seen_positions[i, :held] = trees[i].past
        seen_positions[:, behind:] = positions
        return {"input_ids": ids, "positions": positions, "seen_positions": seen_positions,
                "sees": sees, "past": past}  # fmt: skip


def _output(pooling: Pooling) -> str:
    return "pooled" if pooling.name == "pooler" else f"layer_{pooling.layer}"
