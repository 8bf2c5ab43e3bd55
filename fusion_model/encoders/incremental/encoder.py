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
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fusion_model.encoders.incremental.cache import MAX_BYTES, Entry
from fusion_model.encoders.incremental.passes import TreePass
from fusion_model.encoders.incremental.stream import Stream
from fusion_model.encoders.incremental.trees import Tree
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

    def stream(self, max_bytes: int = MAX_BYTES) -> Stream:
        """Encodes texts as they grow, and keeps what it may need again."""
        return Stream(self, max_bytes)

    @property
    def layers(self) -> EncoderLayers:
        """Made when first needed: by then the model was moved and cast."""
        if self._layers is None:
            self._layers = EncoderLayers(self.model)
        return self._layers

    @cached_property
    def _tree_pass(self) -> TreePass:
        return TreePass(self.layers, self.read, self.queries, self.after)

    def empty(self) -> tuple[Tensor, Tensor]:
        """Keys and values, and sums, of a text without nodes; see `cache.Entry`."""
        model, heads = self.model, self.layers.heads
        width, device = model.config.hidden_size, model.device
        shape = 2 * self.deepest, 0, heads, width // heads
        means = {p.layer for p in self.read if p.name == "mean"}
        states = torch.zeros(shape, dtype=model.dtype, device=device)
        return states, torch.zeros(0, len(means), width, device=device)

    @torch.inference_mode()
    def run(self, trees: Sequence[Tree], entries: Sequence[Entry]) -> Tensor:
        """What the poolings read of texts that go on from cached ones, [texts, P E]."""
        return torch.cat(self._tree_pass.run(trees, entries), dim=1).cpu()

    def _proven_layers(self, inputs: list[EncoderInput]) -> EncoderLayers:
        return self.layers  # transformers has no such pass

    def _by_trees(self, layers: EncoderLayers, trees: Sequence[Tree]) -> Tensor:
        return torch.cat(self._tree_pass.run(trees), dim=1)
