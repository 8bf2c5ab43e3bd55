"""Encoders of the architectures known to `fusion_model.encoders.layers`, over trees of nodes.

What a node sees is given, and so are keys and values of nodes computed before: whole sentences,
exact or incremental, are one pass, and a stream goes on from its past (see
`fusion_model.encoders.incremental`). Attention is ONNX Runtime's own operator.

Notation: N trees of L nodes, P nodes of the past each, E width, A heads of width d, layers
counted from 1; layer 0 is the embeddings.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import onnx
import torch
from fusion_model.export.graphs.builder import Graph
from fusion_model.export.graphs.quantize import graph_of
from onnx import TensorProto
from torch import nn

from fusion_model.encoders.layers import ARCHITECTURES, check_architecture, positions_of

INT, BOOL = TensorProto.INT64, TensorProto.BOOL
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "GELUActivation": ("Gelu", {}),
    "NewGELUActivation": ("Gelu", {"approximate": "tanh"}),
    "FastGELUActivation": ("Gelu", {"approximate": "tanh"}),
    "GELUTanh": ("Gelu", {"approximate": "tanh"}),
    "ReLU": ("Relu", {}),
}
WORDS = "words"
ACTIVATION = 6  # its place among the names of a layer's parts
HIDDEN = -1e30  # added to the scores of what a node does not see


def incremental_graph(
    model: Any, wanted: Sequence[int], with_pooler: bool, opset: int, precision: str = "fp32"
) -> onnx.ModelProto | None:
    """The layers that poolings read, of all nodes.

    Inputs: `input_ids` and `positions` [N, L] int64, positions counted from 0; `seen_positions`
    [N, P + L] int64 and `sees` [N, L, P + L] bool, the past first; `past` [2 K, N, P, E], keys and
    values of each of the K layers in turn.
    Outputs: `layer_i` [N, L, E] for each wanted layer i; `states` [2 K, N, L, E], the new nodes'
    part of the past; `pooled` [N, L, E] if asked for. The table of tokens is the weight `words`.

    Args:
        model: of transformers, float32.
        wanted: layers, rising; those above the last are left out.
        with_pooler: give `pooled`, which reads the last layer.

    Returns:
        None for an architecture or an activation that is not known here.
    """
    try:
        check_architecture(model.config)
    except ValueError:
        return None
    where, names = ARCHITECTURES[model.config.model_type]
    activation = attrgetter(names[ACTIVATION])
    kinds = {type(activation(layer)).__name__ for layer in model.get_submodule(where)}
    if kinds - set(ACTIVATIONS):
        return None
    return _Encoder(model, precision).build(list(wanted), with_pooler).model(opset)


class _Encoder:
    def __init__(self, model: Any, precision: str) -> None:
        self.graph, self._model = graph_of("fusion_lm_encoder", precision), model
        where, self._names = ARCHITECTURES[model.config.model_type]
        self._layers = list(model.get_submodule(where))
        self._heads: int = model.config.num_attention_heads
        self._width: int = model.config.hidden_size

    def build(self, wanted: list[int], with_pooler: bool) -> Graph:
        g, width, depth = self.graph, self._width, wanted[-1] if wanted else 0
        ids = g.input("input_ids", ["trees", "nodes"], INT)
        positions = g.input("positions", ["trees", "nodes"], INT)
        seen_positions = g.input("seen_positions", ["trees", "seen"], INT)
        sees = g.input("sees", ["trees", "nodes", "seen"], BOOL)
        past = g.input("past", [2 * depth, "trees", "past", width])
        words = g.weight(WORDS, self._array(self._model.get_input_embeddings().weight))
        hidden = self._embed(words, ids, positions)
        bias = self._bias(sees, positions, seen_positions)
        held = [f"past_{row}" for row in range(2 * depth)]
        if depth:
            g.op_several("Split", past, outs=held, axis=0, num_outputs=2 * depth)
        outputs, states = [(0, hidden)], []
        for number, layer in enumerate(self._layers[:depth]):
            keys, values = held[2 * number : 2 * number + 2]
            hidden, own = self._layer(number, layer, hidden, bias, keys, values)
            outputs.append((number + 1, hidden))
            states += own
        for number, output in outputs:
            if number in wanted:
                g.output(output, f"layer_{number}", ["trees", "nodes", width])
        if depth:
            states = [g.op("Unsqueeze", state, g.ints(0)) for state in states]
            joined = g.op("Concat", *states, axis=0)
            g.output(joined, "states", [2 * depth, "trees", "nodes", width])
        if with_pooler:
            pooled = g.op("Tanh", self._linear(hidden, "pooler", self._model.pooler.dense))
            g.output(pooled, "pooled", ["trees", "nodes", width])
        return g

    @staticmethod
    def _array(parameter: Any) -> np.ndarray:
        found: np.ndarray = parameter.detach().float().numpy()
        return found

    def _linear(self, x: str, name: str, layer: nn.Linear) -> str:
        weight, bias = self._array(layer.weight), self._array(layer.bias)
        return self.graph.linear([x], name, [weight], bias)

    def _norm(self, x: str, name: str, layer: nn.LayerNorm) -> str:
        g = self.graph
        scale = g.weight(f"{name}.weight", self._array(layer.weight))
        shift = g.weight(f"{name}.bias", self._array(layer.bias))
        return g.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=layer.eps)

    def _embed(self, words: str, ids: str, positions: str) -> str:
        g, module = self.graph, self._model.embeddings
        places = g.weight("places", self._array(positions_of(module)))
        at = g.op("Gather", places, positions)
        return self._norm(g.op("Add", g.op("Gather", words, ids), at), "norm", module.LayerNorm)

    def _bias(self, sees: str, positions: str, seen_positions: str) -> str:
        """Added to the scores of attention: [N, 1 or A, L, P + L]."""
        g = self.graph
        hidden = g.op("Where", sees, g.floating(0.0), g.floating(HIDDEN))
        bias = g.op("Unsqueeze", hidden, g.ints(1))
        if self._model.config.model_type != "mpnet":
            return bias
        window = self._model.config.max_position_embeddings
        table = g.weight("relative", self._relative(window))  # [2 window - 1, A]
        ours = g.op("Unsqueeze", positions, g.ints(2))
        theirs = g.op("Unsqueeze", seen_positions, g.ints(1))
        distance = g.op("Add", g.op("Sub", theirs, ours), g.scalar(window - 1))
        relative = g.op("Transpose", g.op("Gather", table, distance), perm=[0, 3, 1, 2])
        return g.op("Add", bias, relative)

    def _relative(self, window: int) -> np.ndarray:
        """MPNet's bias of each distance from 1 - window to window - 1, [2 window - 1, A]."""
        encoder = self._model.encoder
        distances = torch.arange(1 - window, window)
        count = encoder.config.relative_attention_num_buckets
        buckets = encoder.relative_position_bucket(distances, num_buckets=count)
        return self._array(encoder.relative_attention_bias.weight)[buckets.numpy()]

    def _layer(
        self, number: int, layer: Any, hidden: str, bias: str, keys: str, values: str
    ) -> tuple[str, list[str]]:
        """A layer's output [N, L, E], and its keys and values, each [N, L, E]."""
        g, name = self.graph, f"layer{number + 1}"
        parts = attrgetter(*self._names)(layer)
        query, key, value, out, attention_norm, up, activation, down, norm = parts
        own = {
            what: self._linear(hidden, f"{name}.{what}", part)
            for what, part in (("query", query), ("key", key), ("value", value))
        }
        past = [self._by_head(g.op("Squeeze", part, g.ints(0))) for part in (keys, values)]
        attended = g.fresh("attended")
        outs = [attended, f"{name}.present_key", f"{name}.present_value"]
        inputs = [own["query"], own["key"], own["value"], "", "", bias, *past]
        g.op_several(
            "MultiHeadAttention", *inputs, outs=outs, num_heads=self._heads, domain="com.microsoft"
        )
        attended = self._linear(attended, f"{name}.out", out)
        hidden = self._norm(g.op("Add", attended, hidden), f"{name}.norm1", attention_norm)
        operator, options = ACTIVATIONS[type(activation).__name__]
        inner = g.op(operator, self._linear(hidden, f"{name}.up", up), **options)
        inner = self._linear(inner, f"{name}.down", down)
        hidden = self._norm(g.op("Add", inner, hidden), f"{name}.norm2", norm)
        return hidden, [own["key"], own["value"]]

    def _by_head(self, past: str) -> str:
        """[N, P, E] -> [N, A, P, d]."""
        shape = self.graph.ints(0, 0, self._heads, self._width // self._heads)
        return self.graph.op("Transpose", self.graph.op("Reshape", past, shape), perm=[0, 2, 1, 3])
