"""A late-fusion model as another ONNX graph, from `onnx.helper` and the equations alone.

Shares nothing with `fusion_model.export`: no LSTM operator, gates in PyTorch's order, one step
after the other, run by onnx's own reference evaluator. It needs a fixed length.
"""

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def concat_fusion_logits(
    weights: dict[str, np.ndarray], ids: np.ndarray, e: np.ndarray
) -> np.ndarray:
    """[B, T, V] from ids [B, T] and e [B, T, E]; a model of one layer that fuses by concat."""
    nodes, constants = [], []

    def node(kind: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"v{len(nodes)}"], **attributes))
        return f"v{len(nodes) - 1}"

    def constant(array: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(array, f"c{len(constants)}"))
        return f"c{len(constants) - 1}"

    def affine(x: str, weight: str, bias: str) -> str:
        product = node("Gemm", x, constant(weights[weight]), transB=1)
        return node("Add", product, constant(weights[bias]))

    batch, length = ids.shape
    table = constant(weights["embed_tokens.weight"])
    h = c = constant(np.zeros((batch, weights["lstm.weight_hh_l0"].shape[1]), np.float64))
    scores = []
    for t in range(length):
        token = node("Gather", "ids", constant(np.array(t)), axis=1)
        gates = node(
            "Add",
            affine(node("Gather", table, token), "lstm.weight_ih_l0", "lstm.bias_ih_l0"),
            affine(h, "lstm.weight_hh_l0", "lstm.bias_hh_l0"),
        )
        parts = [f"v{len(nodes)}.{gate}" for gate in "ifgo"]
        nodes.append(helper.make_node("Split", [gates], parts, axis=1, num_outputs=4))
        i, f, o = (node("Sigmoid", parts[k]) for k in (0, 1, 3))
        c = node("Add", node("Mul", f, c), node("Mul", i, node("Tanh", parts[2])))
        h = node("Mul", o, node("Tanh", c))
        own = node("Gather", "e", constant(np.array(t)), axis=1)
        joined = node("Concat", h, own, axis=1)
        features = affine(joined, "projection.weight", "projection.bias")
        scores.append(affine(features, "lm_head.weight", "lm_head.bias"))
    nodes.append(
        helper.make_node(
            "Concat",
            [node("Unsqueeze", s, constant(np.array([1]))) for s in scores],
            ["logits"],
            axis=1,
        )
    )
    graph = helper.make_graph(
        nodes,
        "oracle",
        [
            helper.make_tensor_value_info("ids", TensorProto.INT64, ids.shape),
            helper.make_tensor_value_info("e", TensorProto.DOUBLE, e.shape),
        ],
        [helper.make_tensor_value_info("logits", TensorProto.DOUBLE, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    return ReferenceEvaluator(model).run(None, {"ids": ids, "e": e.astype(np.float64)})[0]
