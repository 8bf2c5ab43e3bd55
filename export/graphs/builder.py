"""A small notation for ONNX graphs: nodes by name of operator, weights by array."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

IR_VERSION = 9  # what opset 20 came with; later ones shut out older runtimes for nothing

Dims = Sequence[int | str]
"""Axes of an input or output; a name is an axis of any length."""


class Graph:
    """An ONNX graph under construction; values are referred to by their names.

    Args:
        name: of the graph.
        dtype: float32 or float16, of weights and of arithmetic.
        prefix: of the names of nodes and of values.
    """

    def __init__(self, name: str, dtype: type = np.float32, prefix: str = "") -> None:
        self.name, self.dtype, self._prefix = name, np.dtype(dtype), prefix
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dims: Dims, kind: int = TensorProto.FLOAT) -> str:
        """Declare an input."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, dims))
        return name

    def output(self, value: str, name: str, dims: Dims, kind: int = TensorProto.FLOAT) -> None:
        """Give a value out under a name."""
        self.op("Identity", value, out=name)
        self._outputs.append(helper.make_tensor_value_info(name, kind, dims))

    def weight(self, name: str, array: np.ndarray) -> str:
        """A parameter, kept in the graph's dtype."""
        return self.constant(name, np.ascontiguousarray(array, dtype=self.dtype))

    def constant(self, name: str, array: np.ndarray) -> str:
        """An array, as it is."""
        self.weights[name] = numpy_helper.from_array(array, name)
        return name

    def ints(self, *values: int) -> str:
        """A constant of integers, [len(values)] int64."""
        name = "ints_" + "_".join(str(v) for v in values).replace("-", "m")
        return self.constant(name, np.array(values, dtype=np.int64))

    def scalar(self, value: int) -> str:
        """A constant integer, [] int64."""
        return self.constant(f"int_{value}".replace("-", "m"), np.array(value, dtype=np.int64))

    def floating(self, value: float) -> str:
        """A constant number, [] in the graph's dtype."""
        return self.weight(f"float_{value}", np.array(value))

    def op(self, kind: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """Add a node with one output, and name that output."""
        return self.op_several(kind, *inputs, outs=[out or self.fresh(kind)], **attributes)[0]

    def op_several(
        self, kind: str, *inputs: str, outs: Sequence[str], **attributes: Any
    ) -> list[str]:
        """Add a node with several outputs; an empty name leaves one out."""
        name = f"{self._prefix}{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, outs, name=name, **attributes))
        return list(outs)

    def fresh(self, kind: str) -> str:
        """A name that no value has yet."""
        return f"{self._prefix}{kind.lower()}_{len(self.nodes)}"

    def linear(
        self,
        parts: Sequence[str],
        name: str,
        weights: Sequence[np.ndarray],
        bias: np.ndarray,
        kept: str = "",
    ) -> str:
        """Values [..., in], joined if they are several, times weights plus bias: [..., out].

        Args:
            weights: of each part, [out, in].
            bias: [out].
            kept: of one part, where its weight is in the graph already.
        """
        product = self.product(parts, name, weights, kept)
        return self.op("Add", product, self.weight(f"{name}.bias", bias))

    def product(
        self, parts: Sequence[str], name: str, weights: Sequence[np.ndarray], kept: str
    ) -> str:
        """See `linear`."""
        x = parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=-1)
        if kept:
            return self.op("MatMul", x, self.op("Transpose", kept, perm=[1, 0]))
        return self.op("MatMul", x, self.weight(f"{name}.weight", np.concatenate(weights, 1).T))

    def lstm(
        self, x: str, name: str, arrays: Sequence[np.ndarray], rest: Sequence[str], outs: list[str]
    ) -> None:
        """The operator `LSTM` of one direction: x [T, N, D] to Y [T, 1, N, H], Y_h and Y_c.

        Args:
            arrays: W [1, 4H, D], R [1, 4H, H] and B [1, 8H], gates in ONNX's order.
            rest: lengths [N] int32, or an empty name, and the state before, [1, N, H] each.
            outs: names of what comes out; an empty one leaves Y out.
        """
        weights = [self.weight(f"{name}.{n}", a) for n, a in zip("WRB", arrays, strict=True)]
        hidden = arrays[1].shape[-1]
        self.op_several("LSTM", x, *weights, *rest, outs=outs, hidden_size=hidden)

    def cast(self, x: str, dtype: np.dtype) -> str:
        """x in another type; nothing at all where it has that type by construction."""
        if np.dtype(dtype) == np.float32 and self.dtype == np.float32:
            return x
        return self.op("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def model(self, opset: int) -> onnx.ModelProto:
        """The finished model."""
        graph = helper.make_graph(
            self.nodes, self.name, self._inputs, self._outputs, list(self.weights.values())
        )
        domains = {node.domain for node in self.nodes} - {""}
        return helper.make_model(
            graph,
            opset_imports=[
                helper.make_opsetid("", opset),
                *(helper.make_opsetid(domain, 1) for domain in sorted(domains)),
            ],
            ir_version=IR_VERSION,
            producer_name="fusion-lm",
        )
