"""One pass over trees of texts: from nodes to the vectors that poolings read off them.

`last` is a text's last token, `mean` the mean of all that its end sees; `cls`, `pooler` and `sep`
are the head's own nodes where the text is its head alone, else query nodes, as `mask` always is.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fusion_model.encoders.incremental.attention import CachedAttention, TreeAttention
from fusion_model.encoders.incremental.cache import Entry
from fusion_model.encoders.incremental.trees import Query, Tree
from fusion_model.encoders.layers import EncoderLayers, padded
from fusion_model.encoders.pooling import Pooling


class TreePass:
    """Poolings of an encoder, `static` aside.

    Args:
        layers: the encoder's.
        poolings: each with its layer.
        queries: of the poolings that need some.
        after: special tokens at a text's end.

    Attributes:
        means: layers that `mean` reads.
    """

    def __init__(
        self,
        layers: EncoderLayers,
        poolings: Sequence[Pooling],
        queries: Mapping[str, Query],
        after: int,
    ) -> None:
        self.layers, self.poolings, self._after = layers, poolings, after
        names = {p.name for p in poolings}
        self._queries = {name: query for name, query in queries.items() if name in names}
        self._wanted = sorted({p.layer for p in poolings})
        self.means = sorted({p.layer for p in poolings if p.name == "mean"})

    def run(self, trees: Sequence[Tree], entries: Sequence[Entry] | None = None) -> list[Tensor]:
        """Of each pooling the vectors of the trees' texts, tree after tree, [texts, E].

        Args:
            entries: the cached text that each tree, a path, goes on from, and that gets its nodes.
        """
        device, wanted, top = self.layers.device, self._wanted, self._wanted[-1]
        flats = [tree.flat(self._queries, self._after) for tree in trees]
        ids = torch.tensor([token for flat in flats for token in flat.tokens], device=device)
        at = torch.tensor([place for flat in flats for place in flat.positions], device=device)
        starts = accumulate([0, *(len(flat.tokens) for flat in flats[:-1])])
        pairs = list(zip(starts, flats, strict=True))
        nodes = {
            p: np.array([s + node for s, flat in pairs for node in flat.nodes[p.name]])
            for p in self.poolings
            if p.name != "mean"
        }
        attend: TreeAttention | CachedAttention
        rows = few = None
        if entries is not None:
            attend = CachedAttention(trees, flats, at, self.layers, entries)
        else:
            if top > 0 and top not in self.means:
                read = [nodes[p] for p in self.poolings if p.layer == top]
                rows = np.unique(np.concatenate(read))
            if rows is not None and 2 * len(rows) < len(ids):
                few = torch.from_numpy(rows).to(device)
                nodes |= {p: np.searchsorted(rows, nodes[p]) for p in nodes if p.layer == top}
            attend = TreeAttention(flats, at, self.layers, None if few is None else rows)
        hidden = padded(self.layers.embed(ids, at))
        outputs = dict(zip(wanted, self.layers.run(hidden, wanted, attend, few), strict=True))
        found: dict[Pooling, Tensor] = {}
        for p in self.poolings:
            output = outputs[p.layer]
            if p.name == "mean":
                found[p] = attend.mean(self.means.index(p.layer), output)
                continue
            part = output[torch.from_numpy(nodes[p]).to(device)]
            found[p] = self.layers.pooler(part[:, None]) if p.name == "pooler" else part
        return [found[p].float() for p in self.poolings]
