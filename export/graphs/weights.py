"""Graphs on disk with one file of weights for all of them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto

SMALL = 1024  # bytes; what is smaller stays in the graph, where shape inference needs it
PAGE = 4096  # bytes; from such offsets a runtime can map the file


def save_graphs(models: Mapping[Path, onnx.ModelProto], weights: Path) -> dict[str, int]:
    """Write the graphs, and equal weights of them once, as ONNX external data.

    So a graph's size has no limit, though one ONNX file holds 2 GB. The models are changed: their
    large weights are in the file then.

    Args:
        models: by the path to write, all in the folder of `weights`.

    Returns:
        Where in the file each weight begins.
    """
    found: dict[str, int] = {}
    offsets: dict[bytes, int] = {}
    with open(weights, "wb") as file:
        for path, model in models.items():
            for tensor in model.graph.initializer:
                data = tensor.raw_data
                if len(data) < SMALL:
                    continue
                key = hashlib.sha256(data).digest()
                if key not in offsets:
                    file.write(b"\0" * (-file.tell() % PAGE))
                    offsets[key] = file.tell()
                    file.write(data)
                found[tensor.name] = offsets[key]
                place = {"location": weights.name, "offset": offsets[key], "length": len(data)}
                tensor.ClearField("raw_data")
                tensor.data_location = TensorProto.EXTERNAL
                for name, value in place.items():
                    tensor.external_data.add(key=name, value=str(value))
            path.write_bytes(model.SerializeToString())
    return found
