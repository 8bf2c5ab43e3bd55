"""The layers of BERT-like encoders, run by ourselves.

transformers' own code computes every node of every layer, and texts of one length at a time.
Here texts of all lengths share the products without padding, so that these meet few shapes (a
new one costs oneDNN more than a pass); layers above the last that a pooling reads are left out,
and so are nodes of the top layer that none reads; and attention is the caller's: all to all, or
along a tree with keys and values kept.

Notation: M nodes (tokens of any number of texts, one after the other), E width, A heads of width
d; N texts of L nodes. Layer 0 is the embeddings' output, layer i that of the i-th layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_model.encoders.linear import Linear

BERT = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "intermediate.intermediate_act_fn",
    "output.dense",
    "output.LayerNorm",
)
MPNET = (*(f"attention.attn.{name}" for name in "qkvo"), "attention.LayerNorm", *BERT[5:])
DISTILBERT = (
    *(f"attention.{name}_lin" for name in ("q", "k", "v", "out")),
    "sa_layer_norm",
    "ffn.lin1",
    "ffn.activation",
    "ffn.lin2",
    "output_layer_norm",
)
ARCHITECTURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "bert": ("encoder.layer", BERT),
    "roberta": ("encoder.layer", BERT),
    "xlm-roberta": ("encoder.layer", BERT),
    "camembert": ("encoder.layer", BERT),
    "mpnet": ("encoder.layer", MPNET),
    "distilbert": ("transformer.layer", DISTILBERT),
}

Attend = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, queries [R, A, d], keys and values [M, 2, A, d]) -> [R, A, d]."""


@dataclass(frozen=True)
class Layer:
    """One post-norm layer; `qkv` gives queries, keys and values side by side, [M, 3 E]."""

    qkv: Linear
    out: Linear
    attention_norm: Callable[[Tensor], Tensor]
    up: Linear
    down: Linear
    norm: Callable[[Tensor], Tensor]

    def finish(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """From attention's result and the layer's input, both [M, E], to its output."""
        hidden = self.attention_norm(self.out(attended, hidden))
        return self.norm(self.down(self.up(hidden), hidden))


def check_architecture(config: Any) -> None:
    """Raise `ValueError` for a model that `EncoderLayers` does not cover."""
    if config.model_type not in ARCHITECTURES:
        raise ValueError(
            f"{config.model_type} is not one of {', '.join(ARCHITECTURES)}, whose layers are "
            "known here"
        )
    if getattr(config, "is_decoder", False):
        raise ValueError(f"this {config.model_type} is a decoder, not an encoder")


class EncoderLayers:
    """Embeddings and layers of a transformers encoder of one of `ARCHITECTURES`.

    Args:
        model: in evaluation mode; its weights are read now, so move and cast it before.

    Attributes:
        sizes: if it is a list, it gets the number of nodes of each pass.

    Raises:
        ValueError: another architecture, or a variant that these equations do not cover.
    """

    sizes: ClassVar[list[int] | None] = None

    def __init__(self, model: Any) -> None:
        config = model.config
        check_architecture(config)
        where, names = ARCHITECTURES[config.model_type]
        act = getattr(config, "hidden_act", getattr(config, "activation", None))
        self.layers = [_layer(m, names, act == "gelu") for m in model.get_submodule(where)]
        self.heads: int = config.num_attention_heads
        self.device, self.dtype = model.device, model.dtype
        self.pooler: Any = getattr(model, "pooler", None)
        embeddings = model.embeddings
        self._words = embeddings.word_embeddings.weight.detach()
        self._places = positions_of(embeddings)
        self._norm = _norm(embeddings.LayerNorm)
        self.relative = model.encoder if config.model_type == "mpnet" else None

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Layer 0, [..., E], of ids [...] at positions [...] counted from 0."""
        if self.sizes is not None:
            self.sizes.append(ids.numel())
        return self._norm(F.embedding(ids, self._words) + F.embedding(positions, self._places))

    def position_bias(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        """What MPNet adds to attention for positions [N, L] and [N, K]: [N, A, L, K]."""
        if self.relative is None:
            return None
        buckets = self.relative.relative_position_bucket(
            keys[:, None, :] - queries[:, :, None],
            num_buckets=self.relative.config.relative_attention_num_buckets,
        )
        bias: Tensor = self.relative.relative_attention_bias(buckets)
        return bias.permute(0, 3, 1, 2)

    def run(
        self, hidden: Tensor, wanted: Sequence[int], attend: Attend, rows: Tensor | None = None
    ) -> list[Tensor]:
        """Outputs of the wanted layers, each [M, E].

        Args:
            hidden: layer 0, [M, E].
            wanted: layers, rising; what lies above the last of them is not computed.
            attend: called for each layer with its number, counted from 0, its queries [M, A, d],
                and its keys and values [M, 2, A, d].
            rows: of the last wanted layer these nodes only, [R]: `attend` then gets R queries,
                and the output is [R, E].
        """
        outputs = [hidden] if 0 in wanted else []
        for number, layer in enumerate(self.layers[: max(wanted, default=0)]):
            qkv = layer.qkv(hidden).view(len(hidden), 3, self.heads, -1)
            query = qkv[:, 0]
            if rows is not None and number + 1 == max(wanted):
                query, hidden = query[rows], hidden[rows]
            hidden = layer.finish(attend(number, query, qkv[:, 1:]).flatten(1), hidden)
            if number + 1 in wanted:
                outputs.append(hidden)
        return outputs


def _layer(module: Any, names: Sequence[str], is_gelu: bool) -> Layer:
    parts = attrgetter(*names)(module)
    query, key, value, out, attention_norm, up, activation, down, norm = parts
    qkv = Linear(
        torch.cat([part.weight for part in (query, key, value)]),
        torch.cat([part.bias for part in (query, key, value)]),
    )
    return Layer(
        qkv,
        Linear(out.weight, out.bias),
        _norm(attention_norm),
        Linear(up.weight, up.bias, F.gelu if is_gelu else activation, is_gelu),
        Linear(down.weight, down.bias),
        _norm(norm),
    )


def positions_of(embeddings: Any) -> Tensor:
    """What is added to a token's embedding at each position from 0 on, [window, E]."""
    table = embeddings.position_embeddings
    found: Tensor = table.weight.detach()[
        0 if table.padding_idx is None else table.padding_idx + 1 :
    ]
    kinds = getattr(embeddings, "token_type_embeddings", None)
    return found if kinds is None else found + kinds.weight.detach()[0]


def _norm(module: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    """The same without the cost of calling a module."""
    weight, bias = module.weight.detach(), module.bias.detach()
    return partial(
        F.layer_norm,
        normalized_shape=module.normalized_shape,
        weight=weight,
        bias=bias,
        eps=module.eps,
    )


def padded(nodes: Tensor) -> Tensor:
    """Nodes [M, E] with zeros behind, so that few M occur: oneDNN prepares for each anew."""
    count = len(nodes)
    if nodes.device.type != "cpu" or count < 16:
        return nodes
    step = max(16, 2 ** (count - 1).bit_length() // 8)  # at most an eighth in vain
    return F.pad(nodes, (0, 0, 0, -count % step))
