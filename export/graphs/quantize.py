"""int8 products: weights once, here; activations while the graph runs, each row by itself.

A row's scale spans that row alone, and int8 products add up exactly, so that a score depends
neither on later words nor on what runs beside it. ONNX Runtime's own dynamic quantisation has one
scale a call, its LSTM one a step over all sequences. Here an `LSTM` becomes a product for its
inputs and a `Scan` over the recurrence, and a product of joined vectors, such as h and the prefix
embedding, the sum of one for each: they differ in size.

Activations are unsigned around 128 and weights signed, the pair for which ONNX Runtime uses VNNI
and AMX; weights use 7 of their 8 bits, since x86 processors without VNNI add pairs of products in
16 bits, which would overflow silently. The embedding table stays as it is: its rows are looked up,
not multiplied.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from fusion_model.export.graphs.builder import Graph
from fusion_model.export.graphs.weights import SMALL
from onnx import TensorProto, helper, numpy_helper

LARGEST = 63  # of a weight: 7 bits
MIDDLE = 128  # of an activation
INT32, FLOAT, UINT8 = TensorProto.INT32, TensorProto.FLOAT, TensorProto.UINT8


def quantize(model: onnx.ModelProto) -> onnx.ModelProto:
    """The int8 form of a float32 graph: products with constant weights, and LSTMs."""
    return _Quantized(model).model()


class _Quantized:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._source = model
        graph = model.graph
        self._weights = {w.name: w for w in graph.initializer}
        self._made_by = {out: node for node in graph.node for out in node.output}
        self._widths = _widths(model)
        self._constants: dict[str, onnx.TensorProto] = {}

    def model(self) -> onnx.ModelProto:
        """The graph anew, without what nothing reads any more."""
        graph = self._source.graph
        nodes: list[onnx.NodeProto] = []
        for number, node in enumerate(graph.node):
            new = Graph("int8", prefix=f"int8_{number}.")
            if node.op_type == "MatMul" and self._matrix(node.input[1]) is not None:
                self._product(new, node.input[0], node.input[1], node.output[0])
            elif node.op_type == "LSTM":
                self._lstm(new, node)
            else:
                new.nodes.append(node)
            nodes += new.nodes
        nodes = _needed(nodes, [value.name for value in graph.output])
        read = _read(nodes)
        kept = [w for w in (*graph.initializer, *self._constants.values()) if w.name in read]
        built = helper.make_graph(nodes, graph.name, graph.input, graph.output, kept)
        return helper.make_model(
            built,
            opset_imports=[*self._source.opset_import, helper.make_opsetid("com.microsoft", 1)],
            ir_version=self._source.ir_version,
            producer_name=self._source.producer_name,
        )

    def _matrix(self, name: str) -> np.ndarray | None:
        """A constant [K, N], or a transposed one; None for what is computed."""
        made_by = self._made_by.get(name)
        if made_by is not None and made_by.op_type == "Transpose":
            whole = self._matrix(made_by.input[0])
            return None if whole is None else whole.T
        if name not in self._weights:
            return None
        found: np.ndarray = numpy_helper.to_array(self._weights[name])
        return found

    def _constant(self, name: str, array: np.ndarray) -> str:
        self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def _weight(self, name: str, weight: np.ndarray) -> tuple[str, str]:
        """int8 [K, N] and the scales of its columns [N], from float32 [K, N]."""
        scale = np.maximum(np.abs(weight).max(axis=0), 1e-30) / LARGEST
        quantised = np.round(weight / scale).astype(np.int8)
        return self._constant(f"{name}.int8", quantised), self._constant(
            f"{name}.scale", scale.astype(np.float32)
        )

    def _rows(self, new: Graph, x: str, weight: tuple[str, str], out: str = "") -> str:
        """x [..., K] times a quantised weight: [..., N] float32."""
        constant = self._constant
        size = new.op("ReduceMax", new.op("Abs", x), constant("int8.last", np.array([-1])))
        unit = constant("int8.unit", np.array(1 / (MIDDLE - 1), dtype=np.float32))
        least = constant("int8.least", np.array(1e-30, dtype=np.float32))
        scale = new.op("Max", new.op("Mul", size, unit), least)  # [..., 1]
        # A half more: the cast cuts off what is behind the point.
        middle = constant("int8.middle", np.array(MIDDLE + 0.5, dtype=np.float32))
        shifted = new.op("Add", new.op("Div", x, scale), middle)
        zero = constant("int8.zero", np.array(MIDDLE, dtype=np.uint8))
        one = constant("int8.unscaled", np.array(1, dtype=np.float32))
        product = new.op(
            "MatMulIntegerToFloat",
            *(new.op("Cast", shifted, to=UINT8), weight[0], one, weight[1], zero),
            domain="com.microsoft",
        )
        return new.op("Mul", product, scale, out=out)

    def _product(self, new: Graph, x: str, name: str, out: str = "") -> str:
        """x times a weight of the graph; for joined x a sum, so that each part has its scale."""
        weight = self._matrix(name)
        assert weight is not None
        joined = self._made_by.get(x)
        parts = [x]
        if joined is not None and joined.op_type == "Concat":
            widths = [self._widths.get(part) for part in joined.input]
            if None not in widths and sum(filter(None, widths)) == len(weight):
                parts = list(joined.input)
        start, total = 0, ""
        for number, part in enumerate(parts):
            end = start + (len(weight) if len(parts) == 1 else self._widths[part])
            last = number == len(parts) - 1
            own = self._weight(f"{name}.{number}", weight[start:end])
            found = self._rows(new, part, own, out if last and not total else "")
            total = new.op("Add", total, found, out=out if last else "") if total else found
            start = end
        return total

    def _lstm(self, new: Graph, node: onnx.NodeProto) -> None:
        """The standard operator's inputs and outputs: Y [T, 1, N, H], Y_h and Y_c [1, N, H]."""
        x, w, r, b, lengths, h0, c0 = node.input
        name = w.rpartition(".")[0] + w[-1]
        inner, outer, biases = (numpy_helper.to_array(self._weights[n])[0] for n in (w, r, b))
        gates = self._rows(new, x, self._weight(w, inner.T))  # [T, N, 4H]
        bias = self._constant(f"{name}.bias", biases[: len(inner)] + biases[len(inner) :])
        first = self._constant("int8.first", np.array([0]))
        states = [new.op("Squeeze", state, first) for state in (h0, c0)]
        if lengths:
            states.append(self._constant("int8.step", np.zeros(1, dtype=np.int32)))
        ends = [f"{name}.{output}" for output in ("h", "c", "steps")[: len(states)]]
        every = f"{name}.every"
        new.op_several(
            "Scan",
            *states,
            new.op("Add", gates, bias),
            outs=[*ends, every],
            body=self._step(name, self._weight(r, outer.T), lengths),
            num_scan_inputs=1,
        )
        if node.output[0]:
            second = self._constant("int8.second", np.array([1]))
            new.op("Unsqueeze", every, second, out=node.output[0])
        for end, out in zip(ends[:2], node.output[1:], strict=True):
            new.op("Unsqueeze", end, first, out=out)

    def _step(self, name: str, outer: tuple[str, str], lengths: str) -> onnx.GraphProto:
        """A step of all rows: h and c [N, H], with `lengths` the step's number, and gates [N, 4H]
        to the same and h; a row that is over keeps its state."""
        new = Graph(f"{name}.step", prefix=f"{name}.step.")
        h, c, t, gates = (f"{name}.{what}_in" for what in ("h", "c", "t", "gates"))
        scores = new.op("Add", gates, self._rows(new, h, outer))
        parts = [f"{name}.{gate}" for gate in "iofg"]  # ONNX's order
        new.op_several("Split", scores, outs=parts, axis=1, num_outputs=4)
        i, o, f = (new.op("Sigmoid", part) for part in parts[:3])
        held = new.op("Mul", f, c)
        c_next = new.op("Add", held, new.op("Mul", i, new.op("Tanh", parts[3])))
        h_next = new.op("Mul", o, new.op("Tanh", c_next))
        inputs, outputs = [h, c], [h_next, c_next]
        if lengths:
            runs = new.op("Less", t, lengths)
            runs = new.op("Unsqueeze", runs, self._constant("int8.second", np.array([1])))
            outputs = [new.op("Where", runs, *pair) for pair in zip(outputs, inputs, strict=True)]
            one = self._constant("int8.one", np.ones(1, dtype=np.int32))
            inputs, outputs = [*inputs, t], [*outputs, new.op("Add", t, one)]
        outputs.append(new.op("Identity", outputs[0]))

        def values(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
            counter = names[2] if lengths else ""
            return [
                helper.make_tensor_value_info(n, *((INT32, [1]) if n == counter else (FLOAT, None)))
                for n in names
            ]

        return helper.make_graph(
            new.nodes,
            f"{name}.step",
            values([*inputs, gates]),
            values(outputs),
        )


def _widths(model: onnx.ModelProto) -> dict[str, int]:
    """The last axis of each value, where it is known.

    Shape inference serialises what it is given: of large weights it gets shape and type only.
    """
    graph = model.graph
    large = [w for w in graph.initializer if len(w.raw_data) >= SMALL]
    inputs = [helper.make_tensor_value_info(w.name, w.data_type, w.dims) for w in large]
    small = [w for w in graph.initializer if len(w.raw_data) < SMALL]
    bare = helper.make_graph(graph.node, graph.name, [*graph.input, *inputs], graph.output, small)
    bare_model = helper.make_model(bare, opset_imports=model.opset_import)
    inferred = onnx.shape_inference.infer_shapes(bare_model).graph
    found = {}
    for value in (*inferred.input, *inferred.value_info):
        dims = value.type.tensor_type.shape.dim
        if dims and dims[-1].HasField("dim_value"):
            found[value.name] = int(dims[-1].dim_value)
    return found


def _read(nodes: Sequence[onnx.NodeProto]) -> set[str]:
    """Names that nodes read, those in their bodies too."""
    found = {name for node in nodes for name in node.input}
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found |= _read(attribute.g.node)
    return found


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> list[onnx.NodeProto]:
    """Nodes that the outputs depend on, in their order."""
    wanted, kept = set(outputs), list[onnx.NodeProto]()
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= _read([node])
    return kept[::-1]
