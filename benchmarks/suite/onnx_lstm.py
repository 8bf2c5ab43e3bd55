"""A bare LSTM as an ONNX graph of one node, for comparison with the bare LSTMs of PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fusion_model.export.graphs.builder import Graph
from fusion_model.export.runtime.session import open_session
from torch import nn


def lstm_session(lstm: nn.LSTM, device: str, threads: int, folder: Path) -> Any:
    """An ONNX Runtime session: x [T, B, D], h0 and c0 [1, B, H] in, out [T, 1, B, H]."""
    g, hidden = Graph("lstm"), lstm.hidden_size

    def reordered(name: str) -> np.ndarray:  # PyTorch's gates i f g o -> ONNX's i o f g
        i, f, c, o = np.split(getattr(lstm, name).detach().cpu().numpy(), 4)
        return np.concatenate([i, o, f, c])

    biases = np.concatenate([reordered("bias_ih_l0"), reordered("bias_hh_l0")])
    weights = {"W": reordered("weight_ih_l0"), "R": reordered("weight_hh_l0"), "B": biases}
    inputs = [
        g.input("x", ["length", "batch", lstm.input_size]),
        *(g.weight(name, array[None]) for name, array in weights.items()),
        "",
        *(g.input(name, [1, "batch", hidden]) for name in ("h0", "c0")),
    ]
    (out,) = g.op_several("LSTM", *inputs, outs=["lstm_out"], hidden_size=hidden)
    g.output(out, "out", ["length", 1, "batch", hidden])
    path = folder / "lstm.onnx"
    onnx.save(g.model(20), path)
    return open_session(path, device, threads)
