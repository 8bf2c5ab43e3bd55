"""The language model as two ONNX graphs: whole sequences for scoring, steps for generation.

Notation: B sequences, T tokens, R prefixes (rows), D embedding width, H hidden width, E width
of the prefix embeddings, V vocabulary, L layers. Inside, time comes first: [T, B, …], since the
standard `LSTM` operator has that layout on every provider. Gates are re-ordered once, here, from
PyTorch's input, forget, cell, output to ONNX's input, output, forget, cell.

Early fusion with an embedding a position starts anew for every prefix. The sequence graph then
runs all R prefixes as rows of one batch, each with its own initial state and length.
"""

import numpy as np
import onnx
from fusion_model.export.graphs.builder import Graph
from fusion_model.export.graphs.quantize import graph_of
from onnx import TensorProto

from fusion_model.fusion import initial_state
from fusion_model.model import FusionLMForCausalLM
from fusion_model.names import EARLY, LATE

INT, FLOAT = TensorProto.INT64, TensorProto.FLOAT


def sequence_graph(
    model: FusionLMForCausalLM, opset: int, precision: str = "fp32"
) -> onnx.ModelProto:
    """Log-probabilities of given targets, in nats.

    Inputs: `input_ids` and `targets` [B, T] int64; `prefix_embeds` [B, T, E] float32 where fused;
    but for early fusion also the state before, `h0` and `c0` [L, B, H] in the graph's dtype. For
    early fusion `prefix_embeds` is [B, R, E] and `targets` [B, R]: the last R prefixes of the T
    tokens. `boundary_ids` [K] int64 are tokens of which one, whichever, is asked for beside the
    target (K of 1 costs nothing).
    Outputs: `target_log_probs` and `boundary_log_probs`, float32 of the targets' shape; the state
    after, `h` and `c`, but for early fusion.
    """
    parts = _Parts(model, graph_of("fusion_lm_sequence", precision))
    g, config, early = parts.graph, model.config, model.config.fusion in EARLY
    rows = "rows" if early else "length"
    ids = g.input("input_ids", ["batch", "length"], INT)
    targets = g.op("Transpose", g.input("targets", ["batch", rows], INT), perm=[1, 0])
    boundary = g.input("boundary_ids", ["boundaries"], INT)
    e = parts.prefix_input(["batch", rows, config.prefix_size])
    if early:
        hidden = [parts.prefixes(ids, e)]  # [R * B, H]
    else:
        state = parts.state_inputs()
        e = e and g.op("Transpose", e, perm=[1, 0, 2])
        steps, _, after = parts.recurrence(parts.inputs(ids, e), state)
        # Two axes from here on: ONNX Runtime adds a bias inside the product only then.
        last = g.op("Reshape", steps, g.ints(-1, config.hidden_size))
        hidden = parts.late(last, e and g.op("Reshape", e, g.ints(-1, config.prefix_size)))
    # Not ReduceLogSumExp: ONNX Runtime's takes four times as long on a CPU.
    log_probs = g.op("LogSoftmax", parts.logits(hidden), axis=-1)  # [T * B, V]
    of_target = g.op("GatherElements", log_probs, g.op("Reshape", targets, g.ints(-1, 1)), axis=1)
    of_boundary = g.op("Gather", log_probs, boundary, axis=1)
    of_boundary = g.op("ReduceLogSumExp", of_boundary, g.ints(-1), keepdims=1)
    shape = g.op("Shape", targets)
    for value, name in ((of_target, "target_log_probs"), (of_boundary, "boundary_log_probs")):
        by_step = g.op("Reshape", value, shape)
        g.output(g.op("Transpose", by_step, perm=[1, 0]), name, ["batch", rows])
    if not early:
        parts.state_outputs(after)
    return g.model(opset)


def step_graph(model: FusionLMForCausalLM, opset: int, precision: str = "fp32") -> onnx.ModelProto:
    """Scores of the token after those given; any number of tokens goes in at once.

    Inputs: `input_ids` [B, T] int64, the tokens since the state; `h0` and `c0` [L, S, H], the
    state before, in the graph's dtype; `rows` [B] int64, which of the S states each goes on from
    (beam search re-orders them, on the device); where fused `prefix_embeds` float32, [B, E] the
    embedding of all tokens so far (`input` fusion: [B, T, E], one a token). Early fusion takes its
    initial state from `prefix_embeds` where `fresh` [] bool is true, and from `h0`, `c0` elsewhere.
    Outputs: `logits` [B, V] float32 after the last token, and the state after, `h` and `c`.
    """
    parts = _Parts(model, graph_of("fusion_lm_step", precision))
    g, fusion = parts.graph, model.config.fusion
    ids = g.input("input_ids", ["batch", "length"], INT)
    per_token = fusion == "input"
    e = parts.prefix_input(["batch", *(["length"] if per_token else []), model.config.prefix_size])
    rows = g.input("rows", ["batch"], INT)
    h0, c0 = (g.op("Gather", s, rows, axis=1) for s in parts.state_inputs("states"))
    if fusion in EARLY:
        fresh, starts = g.input("fresh", [], TensorProto.BOOL), parts.initial(e)
        h0, c0 = (g.op("Where", fresh, *pair) for pair in zip(starts, (h0, c0), strict=True))
    if per_token:
        e = g.op("Transpose", e, perm=[1, 0, 2])
    _, last, after = parts.recurrence(parts.inputs(ids, e), (h0, c0), only_last=True)
    hidden = parts.late(g.op("Squeeze", last, g.ints(0)), e)
    g.output(parts.logits(hidden), "logits", ["batch", model.config.vocab_size])
    parts.state_outputs(after)
    return g.model(opset)


class _Parts:
    """The pieces that both graphs consist of; every method adds nodes and names their result."""

    def __init__(self, model: FusionLMForCausalLM, graph: Graph) -> None:
        self.config, self.graph = model.config, graph
        self._weights = {k: v.detach().float().numpy() for k, v in model.state_dict().items()}
        self._state_kind = FLOAT if graph.dtype == np.float32 else TensorProto.FLOAT16

    def prefix_input(self, dims: list[int | str]) -> str:
        """`prefix_embeds`, or nothing for an unfused model."""
        if self.config.fusion == "none":
            return ""
        g, scale = self.graph, self._weights.get("prefix_scale")
        e = g.cast(g.input("prefix_embeds", dims), g.dtype)
        return e if scale is None else g.op("Mul", e, g.weight("prefix_scale", scale))

    def state_inputs(self, count: str = "batch") -> tuple[str, str]:
        dims = (self.config.num_layers, count, self.config.hidden_size)
        h0, c0 = (self.graph.input(name, dims, self._state_kind) for name in ("h0", "c0"))
        return h0, c0

    def state_outputs(self, state: tuple[str, str]) -> None:
        dims = (self.config.num_layers, "batch", self.config.hidden_size)
        for value, name in zip(state, ("h", "c"), strict=True):
            self.graph.output(value, name, dims, self._state_kind)

    def inputs(self, ids: str, e: str) -> str:
        """What the LSTM reads, [T, B, D] ([T, B, D + E] for `input` fusion); e [T, B, E]."""
        g = self.graph
        x = g.op("Gather", self._table(), g.op("Transpose", ids, perm=[1, 0]), axis=0)
        return g.op("Concat", x, e, axis=2) if self.config.fusion == "input" else x

    def _table(self) -> str:
        """Embeddings of the tokens, [V, D]."""
        return self.graph.weight("embed_tokens.weight", self._weights["embed_tokens.weight"])

    def _layer(self, k: int) -> list[np.ndarray]:
        """W [1, 4H, in], R [1, 4H, H] and B [1, 8H] of a layer, as the LSTM operator wants."""

        def reordered(name: str) -> np.ndarray:
            i, f, g, o = np.split(self._weights[f"lstm.{name}_l{k}"], 4)
            return np.concatenate([i, o, f, g])

        biases = np.concatenate([reordered("bias_ih"), reordered("bias_hh")])
        return [a[None] for a in (reordered("weight_ih"), reordered("weight_hh"), biases)]

    def recurrence(
        self, x: str, state: tuple[str, str], lengths: str = "", only_last: bool = False
    ) -> tuple[str, str, tuple[str, str]]:
        """All layers over x [T, N, D] from a state [L, N, H].

        Returns the top layer's h at every step, [T, N, H] (nothing if `only_last`), at the last
        step, [1, N, H], and the state after, [L, N, H] each.
        """
        g, layers = self.graph, self.config.num_layers
        starts = [self._by_layer(s) for s in state]
        h_last, c_last = [], []
        for k in range(layers):
            all_steps = "" if only_last and k == layers - 1 else f"lstm{k}.Y"
            outs = [all_steps, f"lstm{k}.Y_h", f"lstm{k}.Y_c"]
            g.lstm(x, f"lstm{k}", self._layer(k), [lengths, starts[0][k], starts[1][k]], outs)
            x = all_steps and g.op("Squeeze", all_steps, g.ints(1))
            h_last.append(outs[1])
            c_last.append(outs[2])
        if layers == 1:
            return x, h_last[0], (h_last[0], c_last[0])
        after = g.op("Concat", *h_last, axis=0), g.op("Concat", *c_last, axis=0)
        return x, h_last[-1], after

    def _by_layer(self, state: str) -> list[str]:
        layers = self.config.num_layers
        if layers == 1:
            return [state]
        names = [f"{self.graph.fresh('layer')}_{k}" for k in range(layers)]
        return self.graph.op_several("Split", state, outs=names, axis=0, num_outputs=layers)

    def projected(self, e: str) -> str:
        """e at the hidden width, where the model has a projection for it."""
        if "prefix_projection.weight" not in self._weights:
            return e
        return self._linear([e], "prefix_projection")

    def _linear(self, parts: list[str], name: str, kept: str = "") -> str:
        """An affine layer of one value, or of h and another; `kept`: see `Graph.linear`."""
        ends = [self.config.hidden_size][: len(parts) - 1]
        weights = np.split(self._weights[f"{name}.weight"], ends, axis=1)
        return self.graph.linear(parts, name, weights, self._weights[f"{name}.bias"], kept)

    def initial(self, e: str) -> tuple[str, str]:
        """Early fusion's initial state of every layer, [L, N, H] each, from e [N, E]."""
        g, fusion, layers = self.graph, self.config.fusion, self.config.num_layers
        h = g.op("Unsqueeze", self.projected(e), g.ints(0))
        h = g.op("Concat", *[h] * layers, axis=0) if layers > 1 else h
        zeros = g.op("Sub", h, h)
        return initial_state(fusion, h, zeros)

    def prefixes(self, ids: str, e: str) -> str:
        """h at the end of each prefix, [R * B, H], from ids [B, T] and e [B, R, E].

        Row r * B + b of the LSTM's batch reads sequence b up to its token T - R + r.
        """
        g, config = self.graph, self.config
        by_row = g.op("Transpose", e, perm=[1, 0, 2])  # [R, B, E]
        state = self.initial(g.op("Reshape", by_row, g.ints(-1, config.prefix_size)))
        rows_batch = g.op("Slice", g.op("Shape", by_row), g.ints(0), g.ints(2))  # [R, B]
        rows = g.op("Slice", rows_batch, g.ints(0), g.ints(1))
        length = g.op("Slice", g.op("Shape", ids), g.ints(1), g.ints(2))
        x = self.inputs(ids, "")  # [T, B, D]
        x = g.op("Tile", x, g.op("Concat", g.ints(1), rows, g.ints(1), axis=0))  # [T, R * B, D]
        end = g.op("Squeeze", g.op("Add", length, g.ints(1)), g.ints(0))
        first = g.op("Sub", end, g.op("Squeeze", rows, g.ints(0)))
        own = g.op("Unsqueeze", g.op("Range", first, end, g.scalar(1)), g.ints(1))  # [R, 1]
        lengths = g.op("Reshape", g.op("Expand", own, rows_batch), g.ints(-1))
        lengths = g.op("Cast", lengths, to=TensorProto.INT32)
        _, last, _ = self.recurrence(x, state, lengths, only_last=True)  # [1, R * B, H]
        return g.op("Squeeze", last, g.ints(0))

    def late(self, hidden: str, e: str) -> list[str]:
        """hidden [N, H] fused with e [N, E], side by side for `concat`; hidden itself for the
        other fusions."""
        g, fusion = self.graph, self.config.fusion
        if fusion not in LATE:
            return [hidden]
        if fusion == "concat":
            return [hidden, e]
        e = self.projected(e)
        if fusion != "gate":
            return [g.op({"add": "Add", "multiply": "Mul"}[fusion], hidden, e)]
        gate = g.op("Sigmoid", self._linear([hidden, e], "gate"))
        # gate * hidden + (1 - gate) * e, with one product fewer
        return [g.op("Add", e, g.op("Mul", gate, g.op("Sub", hidden, e)))]

    def logits(self, hidden: list[str]) -> str:
        """Scores in float32, [N, V], from what `late` gives."""
        features = self._linear(hidden, "projection")
        kept = self._table() if self.config.tie_weights else ""  # one matrix, kept once
        scores = self._linear([features], "lm_head", kept)
        return self.graph.cast(scores, np.dtype(np.float32))
