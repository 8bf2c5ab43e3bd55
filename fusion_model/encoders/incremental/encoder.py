"""Policy `incremental`: earlier tokens' keys and values are kept, a new token costs one token.

The encoder reads the empty text, or with `refresh:K` the text up to every K-th token, exactly and
all to all: the head. Every later token sees the head and the tokens before it. All prefixes of a
sentence so become one pass over a tree: a path for the sentence, and side branches where a prefix
ends inside a word that the encoder splits otherwise. In a stream the nodes' keys and values stay
(`fusion_model.encoders.incremental.cache`), and a new token is a pass over one node. Poolings:
`last` and `mean` (of the head and the path) are read off the nodes, `cls`, `pooler`, `sep` and
`mask` by a query node that sees the path and that none sees.

Notation: as in `fusion_model.encoders.layers`; a batch is N trees of up to L nodes, M in all, with
up to P past nodes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion_model.encoders.batching import shrinking
from fusion_model.encoders.graphs import FEW_TOKENS
from fusion_model.encoders.incremental.attention import AlongTrees
from fusion_model.encoders.incremental.cache import NodePool
from fusion_model.encoders.incremental.trees import Tree, grow_trees, similar_sizes
from fusion_model.encoders.inputs import Progress
from fusion_model.encoders.layers import EncoderLayers, check_architecture, padded
from fusion_model.encoders.pooling import Pooling
from fusion_model.encoders.pretrained import HFEncoder
from fusion_model.encoders.transfers import Returns, overlapped, sent
from fusion_model.errors import EncoderError

QUERIES = ("cls", "pooler", "sep", "mask")


class IncrementalEncoder(HFEncoder):
    """A pretrained encoder that goes on from where it was; see the module.

    Raises:
        EncoderError: an architecture whose layers are not known here.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        pooling: str = "cls",
        policy: str = "incremental",
    ) -> None:
        super().__init__(name, model, tokenizer, pooling, policy)
        try:
            check_architecture(model.config)
        except ValueError as error:
            raise EncoderError(f"{name} cannot be incremental: {error}") from None
        self._queries = [p for p in self.poolings if p.name in QUERIES]
        self._query_nodes = [
            (self._query_token(p), p.name in ("cls", "pooler")) for p in self._queries
        ]
        self.means = sorted({self.layer_of(p) for p in self.poolings if p.name == "mean"})

    def _query_token(self, pooling: Pooling) -> int:
        if pooling.name == "mask":
            return int(self.tokenizer.mask_token_id)
        return self.specials[self._before if pooling.name == "sep" else 0]

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}:incremental"

    @property
    def layers(self) -> EncoderLayers:
        """Made when first needed: by then the model was moved and cast."""
        if self._layers is None:
            self._layers = EncoderLayers(self.model)
        return self._layers

    def parse(self, item: bytes) -> tuple[list[int], list[int]]:
        """The head with its special tokens, and the tokens after it."""
        ids = np.frombuffer(item, dtype="<i4").tolist()
        end = ids[0] + 1
        before, after = self.specials[: self._before], self.specials[self._before :]
        return [*before, *ids[1:end], *after], ids[end:]

    @property
    def after(self) -> int:
        """Special tokens at the end of a text; the next token takes the first one's position."""
        return self._after

    def stream(self) -> NodePool:
        """Encodes texts as they grow, and keeps what it may need again."""
        return NodePool(self)

    def _encode_unique(self, items: list[bytes], progress: Progress | None) -> Tensor:
        out = torch.empty(len(items), self.dim)
        returns, done = Returns(self.model.device), 0

        def encode(places: Sequence[int], budget: int) -> Iterator[list[int]]:
            trees = grow_trees([self.parse(items[place]) for place in places], self._after)
            batches = similar_sizes(trees, budget)
            for (rows, _), found in overlapped(
                batches, lambda batch: returns.start(self.run(batch[1])), returns.ahead
            ):
                done_now = [places[row] for row in rows]
                out[done_now] = found
                yield done_now

        for rows in shrinking(range(len(items)), self.budget, encode, self._shrink):
            done += len(rows)
            if progress:
                progress(done, len(items))
        return out

    @torch.inference_mode()
    def run(self, trees: Sequence[Tree], pool: NodePool | None = None) -> Tensor:
        """Vectors of the trees' texts, tree after tree, [sum of texts, dim].

        Args:
            pool: holds the trees' past; gets the nodes of trees that name slots.
        """
        device, dtype = self.model.device, self.model.dtype
        grids = [tree.grid(self._query_nodes) for tree in trees]
        ids = sent(torch.tensor([token for grid in grids for token in grid.tokens]), device)
        at = sent(torch.tensor([place for grid in grids for place in grid.positions]), device)
        attend = AlongTrees(trees, grids, at, self.layers, dtype, pool)
        wanted = sorted({self.layer_of(p) for p in self.poolings if p.name != "static"})

        def compute() -> list[Tensor]:
            nodes = padded(self.layers.embed(ids[None], at[None])[0])
            of_layers = dict(zip(wanted, self.layers.run(nodes, wanted, attend), strict=True))
            sums = [attend.sums(of_layers[p], number) for number, p in enumerate(self.means)]
            return [*of_layers.values(), *sums]

        if pool is not None and pool.graphs is not None and len(ids) <= FEW_TOKENS:
            found = pool.graphs.run("step", [ids, at, *attend.tensors()], compute)
        else:
            found = compute()
        outputs, sums = dict(zip(wanted, found, strict=False)), found[len(wanted) :]
        ends = _Ends(trees, attend.starts, self._after, device)
        seen = attend.seen[ends.nodes]
        parts = []
        for p in self.poolings:
            if p.name == "static":
                parts.append(self.model.get_input_embeddings()(ids[ends.last]).float())
                continue
            output = outputs[self.layer_of(p)]
            if p.name == "mean":
                part = sums[self.means.index(self.layer_of(p))][ends.nodes] / seen[:, None]
            elif p.name == "last":
                part = output[ends.last]
            else:
                part = output[ends.query(p.name, self._queries.index(p))]
                part = self.model.pooler(part[:, None]) if p.name == "pooler" else part
            parts.append(part.float())
        return torch.cat(parts, dim=-1)


class _Ends:
    """Where the nodes lie that a text's vectors are read off, text after text, each [texts]."""

    def __init__(
        self, trees: Sequence[Tree], starts: Sequence[int], after: int, device: torch.device
    ) -> None:
        nodes, last, first, queries = [], [], [], []
        for tree, start in zip(trees, starts, strict=True):
            head, texts = len(tree.head), len(tree.ends)
            own_queries = start + len(tree)
            for number, end in enumerate(tree.ends):
                nodes.append(start + head + end)  # -1: the head's last, which sees all of it
                last.append(start + head + end if end >= 0 else start + head - after - 1)
                first.append(start if end < 0 else -1)
                queries.append((own_queries + number, texts))
        self.nodes, self.last = (sent(torch.tensor(at), device) for at in (nodes, last))
        self._first, self._queries, self._after = sent(torch.tensor(first), device), queries, after

    def query(self, pooling: str, number: int) -> Tensor:
        """Of the pooling that is the `number`-th of the queries; the head's own [CLS] and [SEP]
        where a text ends with it: these are exact."""
        of_texts = torch.tensor([node + number * texts for node, texts in self._queries])
        found = sent(of_texts, self.nodes.device)
        if pooling == "mask":
            return found
        own = self.nodes - self._after + 1 if pooling == "sep" else self._first
        return torch.where(self._first >= 0, own, found)
