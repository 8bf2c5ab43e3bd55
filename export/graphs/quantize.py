"""int8 weights: the LSTM and every matrix product, quantised by ONNX Runtime.

Weights are quantised here, one scale a column; activations while it runs, one scale a call: a
sentence's scores depend, in the third digit after the point, on those it runs with. The embedding
table stays as it is: its rows are looked up, not multiplied.

Weights use 7 of the 8 bits (`reduce_range`). With all 8, x86 processors without VNNI add pairs of
products in 16 bits, which overflow silently; with unsigned weights, they do not, but the ones with
VNNI or AMX take three times as long over a batch.
"""

from pathlib import Path

import onnx
from fusion_model.export.graphs.builder import quiet
from fusion_model.export.runtime.session import runtime

QUANTISED = ("MatMul", "LSTM")


def quantize(model: onnx.ModelProto, path: Path) -> None:
    """Write the int8 form of a float32 graph; `verify.check_graph` sees whether it is one."""
    runtime()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet(None):  # it recommends, on the root logger, what these graphs do not need
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )
