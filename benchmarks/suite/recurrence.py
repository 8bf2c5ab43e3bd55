"""Step, sequence and all prefixes of an LSTM, with each backend.

Notation: B sequences, T tokens, D input width, H hidden width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fusion_model.benchmarks.suite.cases import EAGER, Case
from fusion_model.benchmarks.suite.work import (
    TOLERANCE,
    Context,
    Unavailable,
    Work,
    check_backend,
    compiled,
    of_case,
)
from fusion_model.kernels import lstm_sequence, prefix_lstm
from fusion_model.kernels.cuda_graphs import record
from fusion_model.kernels.lstm import lstm_cell
from torch import Tensor, nn


class Inputs:
    """Weights, tokens and states of a case, random and never zero."""

    def __init__(self, case: Case, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        dtype = getattr(torch, case.dtype)
        b, t, d, h = case.batch, case.length, case.embedding_size, case.hidden_size
        self.lstm = nn.LSTM(d, h, batch_first=True).to(device, dtype).requires_grad_(False)
        self.lstm.eval()  # in training mode cuDNN writes what a backward pass would need
        rows = t if case.operation == "prefixes" else 1

        def random(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) / 2).to(device, dtype)

        self.x, self.h, self.c = random(b, t, d), random(b, rows, h), random(b, rows, h)
        self.layers_first = tuple(s.transpose(0, 1).contiguous() for s in (self.h, self.c))

    def expected(self, prefixes: bool) -> Tensor:
        """By the equations, one step at a time, in float64."""
        x, h, c = (s.double() for s in (self.x, self.h, self.c))
        weights = [[w.double() for w in layer] for layer in self.lstm.all_weights]
        if not prefixes:
            return lstm_sequence(x, (h, c), weights, backend="reference")[0]
        ends = [
            lstm_sequence(x[:, : r + 1], (h[:, r, None], c[:, r, None]), weights)[0][:, -1]
            for r in range(x.shape[1])
        ]
        return torch.stack(ends, dim=1)


def build(case: Case, context: Context) -> Work:
    """Work of `step`, `sequence` or `prefixes`.

    Raises:
        Unavailable: the backend is not installed, or cannot do this.
    """
    data = context.once((case.group, "inputs"), lambda: Inputs(case, context.device))
    prefixes = case.operation == "prefixes"
    ways = {EAGER: _eager, "cuda-graph": _cuda_graph, "compile": _compiled, "onnx": _onnx}
    ways["flashrnn"] = _flashrnn
    if case.backend in ways:
        run = ways[case.backend](case, data, context)
    else:
        check_backend(case.backend, context.device)
        weights = data.lstm.all_weights
        if prefixes:
            run = partial(prefix_lstm, data.x, data.h, data.c, weights, backend=case.backend)
        else:
            state = (data.h, data.c)
            run = partial(lstm_sequence, data.x, state, weights, backend=case.backend)
    run = torch.inference_mode()(run)

    def result() -> Tensor:
        out = run()
        out = out[0] if isinstance(out, (tuple, list)) else out
        return torch.as_tensor(out)

    return Work(
        run,
        result,
        lambda: context.once((case.group, "expected"), lambda: data.expected(prefixes)),
        items=case.batch * case.length,
        counts=of_case(case),
        tolerance=TOLERANCE[case.dtype],
    )


def _eager(case: Case, data: Inputs, context: Context) -> Callable[[], Any]:
    if case.operation != "prefixes":
        return lambda: data.lstm(data.x, data.layers_first)
    # Every prefix a padded row of its own, as the published code batches them.
    b, t, _ = data.x.shape
    last = torch.arange(t, device=context.device)

    def run() -> Tensor:
        rows = data.x[:, None].expand(-1, t, -1, -1).reshape(b * t, t, -1)
        h, c = (s.reshape(1, b * t, -1) for s in (data.h, data.c))
        out = data.lstm(rows, (h, c))[0].view(b, t, t, -1)
        return out[:, last, last]

    return run


def _cuda_graph(case: Case, data: Inputs, context: Context) -> Callable[[], Any]:
    if torch.device(context.device).type != "cuda":
        raise Unavailable("a CUDA graph needs a GPU")
    graph, out = record(torch.inference_mode()(_eager(case, data, context)))

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def _compiled(case: Case, data: Inputs, context: Context) -> Callable[[], Any]:
    # torch.compile leaves nn.LSTM as it is: what it can do shows in the equations.
    def one_step(gates: Tensor, h: Tensor, c: Tensor, w_hh: Tensor) -> tuple[Tensor, Tensor]:
        return lstm_cell(gates + F.linear(h, w_hh), c)

    step = compiled(one_step)
    w_ih, w_hh, b_ih, b_hh = data.lstm.all_weights[0]

    def run() -> Tensor:
        gates, h, c = F.linear(data.x, w_ih, b_ih + b_hh), data.h[:, 0], data.c[:, 0]
        outs = []
        for t in range(data.x.shape[1]):
            h, c = step(gates[:, t], h, c, w_hh)
            outs.append(h)
        return torch.stack(outs, dim=1)

    return run


def _onnx(case: Case, data: Inputs, context: Context) -> Callable[[], Any]:
    try:
        from fusion_model.benchmarks.suite.onnx_lstm import lstm_session
    except ImportError as error:
        raise Unavailable(f"{error.name} is not installed: the extra [onnx]") from None
    if case.dtype != "float32":
        raise Unavailable(f"ONNX Runtime's LSTM has no {case.dtype} on every device")
    session = lstm_session(data.lstm, context.device, torch.get_num_threads(), context.scratch)
    names = ("h0", "c0")
    feed = {"x": data.x.transpose(0, 1).contiguous().cpu().numpy()}
    feed |= {n: s.cpu().numpy() for n, s in zip(names, data.layers_first, strict=True)}

    def run() -> Any:
        return session.run(["out"], feed)[0][:, 0].swapaxes(0, 1)  # [T, 1, B, H] -> [B, T, H]

    return run


def _flashrnn(case: Case, data: Inputs, context: Context) -> Callable[[], Any]:
    try:
        from flashrnn import flashrnn
    except Exception:  # it builds CUDA code when imported
        raise Unavailable("FlashRNN is not installed, or its CUDA build fails here") from None
    w_ih, w_hh, b_ih, b_hh = data.lstm.all_weights[0]
    h = case.hidden_size
    recurrent = w_hh.view(4, 1, h, h)
    bias = (b_ih + b_hh).view(4, 1, h)
    states = torch.stack([data.h[:, :, None], data.c[:, :, None]])

    def run() -> Tensor:
        gates = F.linear(data.x, w_ih).view(case.batch, case.length, 4, 1, h)
        out, _ = flashrnn(gates, recurrent, bias, states=states, function="lstm", backend="cuda")
        return out[0][:, :, 0]

    return run
