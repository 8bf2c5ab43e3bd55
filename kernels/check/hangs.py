"""Launches that could hang: each must end, under its time limit, on the GPU at hand."""

from typing import Any

import torch
from fusion_model.kernels.check.cases import Named, Result
from fusion_model.kernels.triton import configs, guards
from fusion_model.kernels.triton.layout import Backward, Forward, Rows

WIDTH, LOOKS = 64, 1000
# Forward and backward: 8 programs of 4 warps each for WIDTH units.
DEBUG = [configs.SequenceConfig(8, 16, 4, 16, chunks, True) for chunks in (1, 4)]


def _in_vain(device: torch.device, backward: bool) -> Result:
    """A persistent kernel whose programs wait for one that was never started."""
    from fusion_model.kernels.triton.lstm_sequence import sequence_forward
    from fusion_model.kernels.triton.lstm_sequence_backward import sequence_backward

    config, steps, kind = DEBUG[backward], 4, torch.bfloat16
    h = torch.zeros(steps + 1, 1, WIDTH, device=device, dtype=kind)
    gates, grad = torch.zeros(2, steps, 1, 4 * WIDTH, device=device, dtype=kind)
    w = torch.zeros(4 * WIDTH, WIDTH, device=device, dtype=kind)
    c, held, c_saved = h[0].float(), h[0].float(), h.float()

    def in_vain(kernel: Any, grid: tuple[int, ...], args: Any, options: dict[str, Any]) -> None:
        kernel[(grid[0] - 1, grid[1])](*args, **options)

    old, guards.spinning_runner = guards.spinning_runner, in_vain
    try:
        rows = Rows(1, steps, 1)
        if backward:
            args = Backward(h, c, w, c_saved, gates, None, grad, held, rows, config.units)
            sequence_backward(args, config, LOOKS)
        else:
            given = Forward(gates, None, w, h, c, None, None, None, rows, True, config.units)
            sequence_forward(given, config, LOOKS)
        h.sum().item()  # waits for the launch
    finally:
        guards.spinning_runner = old
    return {"ok": True}


def hangs(device: torch.device) -> list[Named]:
    return [
        ("a forward pass in vain gives up", lambda: _in_vain(device, False)),
        ("a backward pass in vain gives up", lambda: _in_vain(device, True)),
    ]
