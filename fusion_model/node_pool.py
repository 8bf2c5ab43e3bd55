"""Keys, values and running sums of encoded tokens, so that texts can grow in any order.

Nodes form a forest: texts that begin alike share them, whoever asked first. Sequences so join,
leave and fork at any step without being named. Memory is bounded: the nodes that were used least
lately go first, and are computed again if needed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fusion_model.trees import Tree, similar_sizes

if TYPE_CHECKING:
    from fusion_model.incremental import IncrementalEncoder

MAX_BYTES = 256 * 2**20
ROOT = -1


class NodePool:
    """What an `IncrementalEncoder` has computed so far.

    Args:
        encoder: encodes.
        max_bytes: most memory for keys, values and sums.

    Attributes:
        keys, values: of each layer, [slots, A, d].
        sums: of each `mean` layer over the path to the node, [slots, layers, E] float32.
        positions: of each node, [slots].
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
        self._free = list(range(self.capacity - 1, -1, -1))
        self._children: dict[tuple[int, int], int] = {}  # (parent's slot, token) -> slot
        self._origin: dict[int, tuple[int, int]] = {}  # the reverse
        self._heads: dict[tuple[int, ...], list[int]] = {}
        self._used = np.zeros(self.capacity, dtype=np.int64)  # the step of the latest use
        self._step = 0

    def __len__(self) -> int:
        """Nodes held."""
        return self.capacity - len(self._free)

    def encode(self, items: Sequence[bytes]) -> Tensor:
        """Vectors [len(items), dim] float32 on the CPU, without repeating what is held."""
        self._step += 1
        encoder = self._encoder
        out = torch.empty(len(items), encoder.dim)
        texts = [encoder.parse(item) for item in items]
        for places, trees in similar_sizes(iter(self._planned(texts)), encoder.budget):
            self._give_slots(trees)
            out[places] = encoder.run(trees, self).float().cpu()
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
            path = list(self._heads.get(tuple(head), ())) if tail else []
            self._used[path] = self._step
            count = 0
            while path and count < len(tail) - 1:
                slot = self._children.get((path[-1], tail[count]))
                if slot is None:
                    break
                path.append(slot)
                self._used[slot] = self._step
                count += 1
            key = (tuple(head), path[-1] if path else ROOT)
            if key not in found:
                depth = len(head) - after + count
                found[key] = [], Tree([] if path else head, path, depth)
            rows, tree = found[key]
            tree.add(tail[count:])
            rows.append(row)
        return list(found.values())

    def _give_slots(self, trees: Sequence[Tree]) -> None:
        """Slots for the new nodes, if need be of nodes that no text of this step has used."""
        new = sum(map(len, trees))
        if new > len(self._free):
            self._evict(new - len(self._free))
        for tree in trees:
            if len(tree) > len(self._free):
                continue  # it is computed all the same, and not held
            if tree.head:
                if tuple(tree.head) in self._heads:
                    continue
                slots = [self._free.pop() for _ in tree.head]
                self._heads[tuple(tree.head)] = slots
            else:
                slots = list(tree.past)
            own = [] if not tree.head else list(slots)
            base = slots[-1]
            placed: list[int] = []
            for token, parent in zip(tree.tokens, tree.parents, strict=True):
                origin = (placed[parent] if parent >= 0 else base, token)
                slot = self._children.get(origin)
                if slot is None:
                    slot = self._children[origin] = self._free.pop()
                    self._origin[slot] = origin
                placed.append(slot)
            tree.slots = own + placed
            self._used[tree.slots] = self._step

    def _evict(self, wanted: int) -> None:
        """Free at least this many slots, or all that this step does not use.

        Whoever uses a node uses those before it: a node is never older than its children.
        """
        held = np.setdiff1d(np.arange(self.capacity), self._free)
        stamps = np.sort(self._used[held])
        limit = min(stamps[min(wanted, len(stamps)) - 1], self._step - 1)
        gone = set(held[self._used[held] <= limit].tolist())
        self._heads = {k: slots for k, slots in self._heads.items() if slots[0] not in gone}
        for slot in gone:
            origin = self._origin.pop(slot, None)
            if origin is not None:
                del self._children[origin]
        self._free += gone

    def targets(self, trees: Sequence[Tree], starts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Slots of all nodes of trees that have some, and where in the pass these nodes are.

        Args:
            starts: the first node of each tree.
        """
        slots = [slot for tree in trees for slot in tree.slots]
        nodes = [
            start + i
            for tree, start in zip(trees, starts, strict=True)
            for i in range(len(tree.slots))
        ]
        device = self.positions.device
        return (
            torch.tensor(slots, dtype=torch.int64, device=device),
            torch.tensor(nodes, dtype=torch.int64, device=device),
        )
