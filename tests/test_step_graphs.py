"""Layers replayed as CUDA graphs: all but the capture itself, which needs a GPU, on a CPU."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fusion_model.kernels import cuda_graphs, lstm_sequence, prefix_lstm
from fusion_model.kernels.cuda_graphs import StepGraphs, worth
from torch import Tensor, nn

pytest.importorskip("triton")

from fusion_model.kernels.triton import lstm_operator


class Recorder:
    """In place of captures: the function again, on the memory that was captured."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, Any]:
        self.captures += 1
        return SimpleNamespace(replay=run), None


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Every layer goes through graphs, as it does on a GPU."""
    found = Recorder()
    graphs = StepGraphs(found)
    monkeypatch.setattr(cuda_graphs, "graphs", graphs)
    monkeypatch.setattr(lstm_operator, "run_steps", graphs.run)
    return found


def both(masked: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a sequence and of prefixes: by the kernels, and the equations."""
    module = nn.LSTM(4, 10, 2, batch_first=True)
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]]) if masked else None
    x, h0 = torch.randn(2, 3, 4), torch.randn(2, 3, 10)
    state = torch.randn(2, 2, 10), torch.randn(2, 2, 10)
    found = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, h0, *state)]
        out, last = lstm_sequence(
            leaves[0], (leaves[2], leaves[3]), module.all_weights, mask=mask, backend=backend
        )
        ends = prefix_lstm(
            leaves[0], leaves[1], leaves[1], module.all_weights, mask=mask, backend=backend
        )
        outputs = [out, *last, ends]
        total = sum(((n + 1) * (o * o).sum() for n, o in enumerate(outputs)), torch.zeros(()))
        gradients = torch.autograd.grad(total, [*leaves, *module.parameters()])
        found.append([*(o.detach() for o in outputs), *gradients])
    return found[0], found[1]


@pytest.mark.parametrize("masked", [False, True])
def test_replayed_layers_are_right(masked: bool, recorder: Recorder) -> None:
    for _ in range(3):
        got, expected = both(masked)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    # Five shapes: both layers of a sequence are one, and both of prefixes backward.
    assert recorder.captures == 5
    assert cuda_graphs.graphs.replays == 3 * 8 - 5


def test_tokens_read_the_table_where_it_lies(recorder: Recorder) -> None:
    from fusion_model.kernels.triton.lstm import gate_table, lstm_tokens

    module, embedding = nn.LSTM(4, 10, batch_first=True), torch.randn(9, 4)
    zeros = torch.zeros(2, 1, 10)
    for _ in range(3):
        ids = torch.randint(9, (2, 3))
        with torch.inference_mode():
            weights = embedding, (zeros, zeros), module.all_weights
            out, _ = lstm_tokens(ids, *weights)
        torch.testing.assert_close(out, module(embedding[ids])[0].detach())
    [(static, _)] = cuda_graphs.graphs._graphs.values()
    table, _ = gate_table(embedding, module.all_weights[0], static.units)
    assert static.x_gates is table
    assert recorder.captures == 1
    with torch.no_grad():
        embedding.mul_(2)  # another table: another graph
        for _ in range(2):
            lstm_tokens(ids, embedding, (zeros, zeros), module.all_weights)
    assert recorder.captures == 2


def test_a_capture_that_fails_is_told_once(recorder: Recorder) -> None:
    def failing(run: Callable[[], Any]) -> tuple[Any, Any]:
        raise RuntimeError("operation not permitted")

    cuda_graphs.graphs._capture = failing
    with pytest.warns(RuntimeWarning, match="rows_backward: no CUDA graph"):
        both(False)  # its two layers are one shape
    with pytest.warns(RuntimeWarning, match="rows_forward: no CUDA graph.*not permitted"):
        got, expected = both(False)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got, expected = both(False)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert cuda_graphs.graphs.replays == 0


def test_few_graphs_are_kept(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST", 2)
    monkeypatch.setattr(cuda_graphs, "SEEN", 4)
    weights = nn.LSTM(4, 10, batch_first=True).all_weights
    with torch.no_grad():
        for steps in (2, 3, 4, 5, 6, 7, 2, 3, 8, 9, 10):
            x, zeros = torch.randn(1, steps, 4), torch.zeros(1, 1, 10)
            for _ in range(2 if recorder.captures < 6 else 1):
                lstm_sequence(x, (zeros, zeros), weights, backend="triton")
    kept = [static.rows.steps for static, _ in cuda_graphs.graphs._graphs.values()]
    assert kept == [6, 7]
    assert len(cuda_graphs.graphs._seen) == 4
    assert recorder.captures == 6  # what was given up is a shape that comes a first time


@pytest.mark.parametrize(
    ("rows", "steps", "size", "expected"),
    [
        (64, 100, 1 << 20, True),
        (1, 16, 1000, True),
        (64, 15, 1000, False),
        (8192, 25, 1 << 20, False),
        (64, 100, 1 << 30, False),
    ],
)
def test_what_is_replayed(rows: int, steps: int, size: int, expected: bool) -> None:
    assert worth(rows, steps, size) == expected


def test_a_cpu_has_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "graphs", None)
    got, expected = both(True)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
