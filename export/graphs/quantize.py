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
from onnx import TensorProto, helper

LARGEST = 63  # of a weight: 7 bits
MIDDLE = 128  # of an activation
INT32, FLOAT, UINT8 = TensorProto.INT32, TensorProto.FLOAT, TensorProto.UINT8


def graph_of(name: str, precision: str) -> Graph:
    """An empty graph of one of `fusion_model.export.manifest.PRECISIONS`."""
    if precision == "int8":
        return Int8Graph(name)
    return Graph(name, np.float16 if precision == "fp16" else np.float32)


class Int8Graph(Graph):
    """A float32 graph whose products with weights, and LSTMs, are int8."""

    def product(
        self, parts: Sequence[str], name: str, weights: Sequence[np.ndarray], kept: str
    ) -> str:
        total = ""
        for number, (x, weight) in enumerate(zip(parts, weights, strict=True)):
            found = self._rows(x, self._quantised(f"{name}.{number}", weight))
            total = self.op("Add", total, found) if total else found
        return total

    def _quantised(self, name: str, weight: np.ndarray) -> tuple[str, str]:
        """int8 [K, N] and the scales of its columns [N], from float32 [N, K]."""
        scale = np.maximum(np.abs(weight).max(axis=1), 1e-30) / LARGEST
        quantised = np.round(weight.T / scale).astype(np.int8)
        return (
            self.constant(f"{name}.int8", np.ascontiguousarray(quantised)),
            self.constant(f"{name}.scale", scale.astype(np.float32)),
        )

    def _rows(self, x: str, weight: tuple[str, str]) -> str:
        """x [..., K] times a quantised weight: [..., N] float32."""
        size = self.op("ReduceMax", self.op("Abs", x), self.ints(-1))
        unit = self.constant("int8.unit", np.array(1 / (MIDDLE - 1), dtype=np.float32))
        least = self.constant("int8.least", np.array(1e-30, dtype=np.float32))
        scale = self.op("Max", self.op("Mul", size, unit), least)  # [..., 1]
        # A half more: the cast cuts off what is behind the point.
        middle = self.constant("int8.middle", np.array(MIDDLE + 0.5, dtype=np.float32))
        shifted = self.op("Add", self.op("Div", x, scale), middle)
        zero = self.constant("int8.zero", np.array(MIDDLE, dtype=np.uint8))
        one = self.constant("int8.unscaled", np.array(1, dtype=np.float32))
        product = self.op(
            "MatMulIntegerToFloat",
            *(self.op("Cast", shifted, to=UINT8), weight[0], one, weight[1], zero),
            domain="com.microsoft",
        )
        return self.op("Mul", product, scale)

    def lstm(
        self, x: str, name: str, arrays: Sequence[np.ndarray], rest: Sequence[str], outs: list[str]
    ) -> None:
        (inner, outer, (biases,)), (lengths, *states) = (
            (arrays[0][0], arrays[1][0], arrays[2]),
            rest,
        )
        gates = self._rows(x, self._quantised(f"{name}.W", inner))  # [T, N, 4H]
        bias = self.constant(f"{name}.bias", biases[: len(inner)] + biases[len(inner) :])
        starts = [self.op("Squeeze", state, self.ints(0)) for state in states]
        if lengths:
            starts.append(self.constant("int8.step", np.zeros(1, dtype=np.int32)))
        ends = [f"{name}.{output}" for output in ("h", "c", "steps")[: len(starts)]]
        every = f"{name}.every"
        self.op_several(
            "Scan",
            *starts,
            self.op("Add", gates, bias),
            outs=[*ends, every],
            body=self._step(name, self._quantised(f"{name}.R", outer), lengths),
            num_scan_inputs=1,
        )
        if outs[0]:
            self.op("Unsqueeze", every, self.ints(1), out=outs[0])
        for end, out in zip(ends[:2], outs[1:], strict=True):
            self.op("Unsqueeze", end, self.ints(0), out=out)

    def _step(self, name: str, outer: tuple[str, str], lengths: str) -> onnx.GraphProto:
        """A step of all rows: h and c [N, H], with `lengths` the step's number, and gates [N, 4H]
        to the same and h; a row that is over keeps its state."""
        new = Int8Graph(f"{name}.step", prefix=f"{name}.step.")
        new.weights = self.weights  # a body reads those of the graph around it
        h, c, t, gates = (f"{name}.{what}_in" for what in ("h", "c", "t", "gates"))
        scores = new.op("Add", gates, new._rows(h, outer))
        parts = [f"{name}.{gate}" for gate in "iofg"]  # ONNX's order
        new.op_several("Split", scores, outs=parts, axis=1, num_outputs=4)
        i, o, f = (new.op("Sigmoid", part) for part in parts[:3])
        held = new.op("Mul", f, c)
        c_next = new.op("Add", held, new.op("Mul", i, new.op("Tanh", parts[3])))
        h_next = new.op("Mul", o, new.op("Tanh", c_next))
        inputs, outputs = [h, c], [h_next, c_next]
        if lengths:
            runs = new.op("Unsqueeze", new.op("Less", t, lengths), new.ints(1))
            outputs = [new.op("Where", runs, *pair) for pair in zip(outputs, inputs, strict=True)]
            one = new.constant("int8.one", np.ones(1, dtype=np.int32))
            inputs, outputs = [*inputs, t], [*outputs, new.op("Add", t, one)]
        outputs.append(new.op("Identity", outputs[0]))

        def values(names: Sequence[str]) -> list[onnx.ValueInfoProto]:
            counter = names[2] if lengths else ""
            return [
                helper.make_tensor_value_info(n, *((INT32, [1]) if n == counter else (FLOAT, None)))
                for n in names
            ]

        return helper.make_graph(new.nodes, new.name, values([*inputs, gates]), values(outputs))
