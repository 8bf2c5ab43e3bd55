"""Policy `incremental`: earlier tokens' keys and values are kept, a new token costs one token.

The encoder reads the empty text, or with `refresh:K` the text up to every K-th token, exactly and
all to all: the head. Every later token sees the head and the tokens before it. All prefixes of a
sentence so become one pass over a tree: a path for the sentence, and side branches where a prefix
ends inside a word that the encoder splits otherwise. In a stream the nodes' keys and values stay
(`fusion_model.encoders.incremental.cache`), and a new token is a pass over one node. Poolings:
`last` and `mean` (of the head and the path) are read off the nodes, `cls`, `pooler`, `sep` and
`mask` by a query node that sees the path and that none sees.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusion_model.encoders.incremental.cache import MAX_BYTES, Entry, TextCache
from fusion_model.encoders.incremental.passes import TreePass
from fusion_model.encoders.incremental.trees import Query, Tree, similar_sizes
from fusion_model.encoders.inputs import EncoderInput
from fusion_model.encoders.layers import EncoderLayers, check_architecture
from fusion_model.encoders.pretrained import HFEncoder
from fusion_model.errors import EncoderError


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

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint}:incremental"

    def stream(self, max_bytes: int = MAX_BYTES) -> "Stream":
        """Encodes texts as they grow, and keeps what it may need again."""
        return Stream(self, max_bytes)

    @property
    def layers(self) -> EncoderLayers:
        """Made when first needed: by then the model was moved and cast."""
        if self._layers is None:
            self._layers = EncoderLayers(self.model)
        return self._layers

    def tree_pass(self) -> TreePass:
        """Reads all poolings besides `static`."""
        return TreePass(self.layers, self.read, self._queries, self.after)

    @property
    def _queries(self) -> dict[str, Query]:
        mask = Query(self.tokenizer.mask_token_id, at_start=False, own=None)
        return {**super()._queries, "mask": mask}

    def _proven_layers(self, inputs: list[EncoderInput]) -> EncoderLayers:
        return self.layers  # transformers has no such pass

    def _by_trees(self, layers: EncoderLayers, trees: Sequence[Tree]) -> Tensor:
        return torch.cat(self.tree_pass().run(trees), dim=1)


class Stream:
    """Encodes texts that grow, each new token once.

    Args:
        encoder: encodes.
        max_bytes: most memory that is held between steps.

    Attributes:
        cache: what is held.
    """

    def __init__(self, encoder: IncrementalEncoder, max_bytes: int = MAX_BYTES) -> None:
        self._encoder, self._pass = encoder, encoder.tree_pass()
        model, heads = encoder.model, encoder.layers.heads
        width = model.config.hidden_size
        shape = 2 * encoder.deepest, 0, heads, width // heads
        states = torch.zeros(shape, dtype=model.dtype, device=model.device)
        sums = torch.zeros(0, len(self._pass.means), width, device=model.device)
        self.cache = TextCache(states, sums, max_bytes)

    @torch.inference_mode()
    def encode(self, inputs: Sequence[EncoderInput]) -> Tensor:
        """Vectors [len(inputs), dim] float32 on the CPU, without repeating what is held."""
        encoder = self._encoder
        texts = [encoder.split(given) for given in inputs] if encoder.read else []
        read = torch.empty(len(inputs), len(encoder.read) * encoder.model.config.hidden_size)
        try:
            planned, entries = self._planned(texts)
            for rows, trees in similar_sizes(planned, encoder.budget):
                found = self._pass.run(trees, [entries[id(tree)] for tree in trees])
                read[rows] = torch.cat(found, dim=1).cpu()
        except BaseException:
            self.cache.entries.clear()  # some tokens are noted that nothing was computed of
            raise
        self.cache.evict()
        return encoder.with_static(inputs, read)

    def _planned(
        self, texts: Sequence[tuple[list[int], list[int]]]
    ) -> tuple[list[tuple[list[int], Tree]], dict[int, Entry]]:
        """Trees of what is new, with the places of their texts; and each tree's entry.

        Texts that go on from the same place and begin alike share a tree. A text's last node is
        always new: only then is there a vector of it.
        """
        planned: list[tuple[list[int], Tree]] = []
        sources: list[tuple[Entry | None, list[int], list[int]]] = []
        latest: dict[Any, tuple[list[int], Tree]] = {}
        for row, (head, tail) in enumerate(texts):
            source, held = self.cache.find(head, tail[:-1]) if tail else (None, -1)
            known, depth = max(held, 0), len(head) - self._encoder.after
            key = tuple(head), id(source), held
            if key not in latest or not latest[key][1].add(tail[known:]):
                past = [*range(len(head)), *range(depth, depth + known)] if source else []
                tree = Tree([] if past else head, past, depth + known)
                tree.add(tail[known:])
                latest[key] = [], tree
                planned.append(latest[key])
                sources.append((source, head, tail[:known]))
            latest[key][0].append(row)
        entries: dict[int, Entry] = {}
        taken: set[Entry] = set()
        for (_, tree), (source, head, tail) in zip(planned, sources, strict=True):
            entry = self.cache.take(source, head, tail, fork=source in taken)
            taken.add(entry)
            new = tree.deepest()[len(tree.head) :]
            entry.tail = [*tail, *(tree.tokens[node - len(tree.head)] for node in new)]
            entry.make_room(len(entry.head) + len(entry.tail))
            entries[id(tree)] = entry
        return planned, entries
