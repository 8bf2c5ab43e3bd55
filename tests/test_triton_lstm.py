"""The recurrent Triton kernels in Triton's interpreter, against the equations and torch.nn.LSTM.

Shapes are odd on purpose.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fusion_model.kernels import LayerWeights, lstm_sequence, prefix_lstm
from fusion_model.kernels.triton import configs, guards
from fusion_model.kernels.triton.configs import padded
from torch import Tensor, nn
from triton_bf16 import right_bfloat16
from triton_programs import concurrent_programs

pytest.importorskip("triton")

from fusion_model.kernels.triton import layout, lstm_naive
from fusion_model.kernels.triton import lstm_sequence as triton_sequence
from fusion_model.kernels.triton import lstm_sequence_backward as triton_backward


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds NaN: what reads it shows."""
    new_empty = Tensor.new_empty

    def poisoned(self: Tensor, *size: Any, **options: Any) -> Tensor:
        fresh = new_empty(self, *size, **options)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.fixture(autouse=True)
def _bfloat16() -> Iterator[None]:
    with right_bfloat16():
        yield


class Case:
    """Random weights and inputs of one shape and dtype, as leaves that take gradients."""

    def __init__(self, batch: int, steps: int, width: int, hidden: int, layers: int, dtype: Any):
        module = nn.LSTM(width, hidden, layers, batch_first=True).to(dtype)
        self.layers = layers
        self.flat = [p.detach().clone() for p in module.parameters()]
        shapes = [(batch, steps, width), *[(batch, layers, hidden)] * 2]
        self.inputs = [torch.randn(*s).to(dtype) for s in shapes]

    def leaves(self, dtype: Any) -> list[Tensor]:
        return [t.to(dtype).requires_grad_() for t in (*self.inputs, *self.flat)]

    def weights(self, leaves: list[Tensor]) -> list[LayerWeights]:
        return [leaves[3 + 4 * n : 7 + 4 * n] for n in range(self.layers)]


def check(run: Any, case: Case, dtype: torch.dtype) -> None:
    """|kernel - exact| <= |equations in the same dtype - exact| + small; gradients too.

    `run(leaves, backend)` gives outputs; float64 by the equations is exact.
    """
    results = {}
    upstream = None
    for name, kind, backend in (
        ("exact", torch.float64, "reference"),
        ("eager", dtype, "reference"),
        ("kernel", dtype, "triton"),
    ):
        leaves = case.leaves(kind)
        outputs = run(leaves, backend)
        if upstream is None:
            upstream = [torch.randn(o.shape, dtype=torch.float64).to(dtype) for o in outputs]
        total = sum((o * u.to(kind)).sum().double() for o, u in zip(outputs, upstream, strict=True))
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
        results[name] = [t.double() for t in (*outputs, *gradients) if t is not None]
    small = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for exact, eager, kernel in zip(*results.values(), strict=True):
        scale = exact.abs().max() + 1
        budget = (eager - exact).abs().max() + small * scale
        assert (kernel - exact).abs().max() <= budget


def padding(batch: int, steps: int) -> Tensor:
    """A mask that pads row 0 on the left and row 1 on the right."""
    mask = torch.ones(batch, steps)
    mask[0, : steps // 2] = 0
    if batch > 1:
        mask[1, 1:] = 0
    return mask


SHAPES = [(1, 1, 3, 5, 1), (3, 5, 4, 9, 2), (2, 4, 6, 70, 1), (17, 3, 2, 20, 1)]
NAMES = [f"B{b}-T{t}-D{d}-H{h}-L{n}" for b, t, d, h, n in SHAPES]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sequence(case: Case, mask: Tensor | None) -> Any:
    def run(leaves: list[Tensor], backend: str) -> list[Tensor]:
        state = (leaves[1], leaves[2])
        out, last = lstm_sequence(
            leaves[0], state, case.weights(leaves), mask=mask, backend=backend
        )
        return [out, *last]

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("persistent", [False, True], ids=["steps", "persistent"])
@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
def test_sequence(
    shape: tuple[int, ...], persistent: bool, masked: bool, dtype: torch.dtype
) -> None:
    case = Case(*shape, dtype)
    mask = padding(*shape[:2]) if masked else None
    with concurrent_programs() if persistent else nullcontext():
        check(sequence(case, mask), case, dtype)


def test_sequence_is_torch_lstm() -> None:
    module = nn.LSTM(5, 11, 2, batch_first=True)
    x, state = torch.randn(3, 4, 5), tuple(torch.randn(2, 3, 2, 11))
    expected, (hn, cn) = module(x, tuple(s.transpose(0, 1).contiguous() for s in state))
    with torch.no_grad():
        out, (h, c) = lstm_sequence(x, state, module.all_weights, backend="triton")
    for got, wanted in ((out, expected), (h, hn.transpose(0, 1)), (c, cn.transpose(0, 1))):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("hidden", "batch", "kind"),
    [(40, 5, "registers"), (40, 33, "shared")],
)
def test_every_kind_of_persistent_launch(
    hidden: int, batch: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inference chooses between two; which one ran is checked, and its numbers."""
    ran = []
    launch = triton_sequence.launch_spinning

    def noting(kernel: Any, *args: Any, **options: Any) -> None:
        ran.append((kernel.fn.__name__, options["SPLIT"]))
        launch(kernel, *args, **options)

    monkeypatch.setattr(triton_sequence, "launch_spinning", noting)
    case = Case(batch, 3, 4, hidden, 1, torch.float16)
    leaves = [leaf.detach() for leaf in case.leaves(torch.float16)]
    exact = [leaf.double() for leaf in leaves]
    with concurrent_programs():
        got, _ = lstm_sequence(
            leaves[0], (leaves[1], leaves[2]), case.weights(leaves), backend="triton"
        )
    assert ran == [("sequence_forward_kernel", kind == "registers")]
    state = exact[1], exact[2]
    expected, _ = lstm_sequence(exact[0], state, case.weights(exact), backend="reference")
    torch.testing.assert_close(got.double(), expected, atol=3e-3, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("shape", [(1, 3, 3, 5, 1), (3, 5, 4, 20, 2)], ids=["small", "two layers"])
def test_prefixes(shape: tuple[int, ...], start: int, masked: bool, dtype: torch.dtype) -> None:
    batch, steps, _, hidden, _ = shape
    case = Case(*shape, dtype)
    case.inputs[1:] = [torch.randn(batch, steps - start, hidden).to(dtype) for _ in range(2)]
    mask = padding(batch, steps) if masked else None

    def run(leaves: list[Tensor], backend: str) -> list[Tensor]:
        h0, c0 = leaves[1], leaves[2]
        weights = case.weights(leaves)
        return [prefix_lstm(leaves[0], h0, c0, weights, mask=mask, backend=backend)]

    check(run, case, dtype)


@pytest.mark.parametrize("units", [8, 16, 32])
def test_packing_puts_a_program_together(units: int) -> None:
    hidden = 37
    w = torch.arange(4 * hidden * 2).view(4 * hidden, 2) + 1
    packed = layout.pack(w, units)
    blocks = packed.view(padded(hidden, units) // units, 4, units, 2)
    for unit in range(padded(hidden, units)):
        for gate in range(4):
            row = blocks[unit // units, gate, unit % units]
            expected = w[gate * hidden + unit] if unit < hidden else torch.zeros(2)
            assert torch.equal(row, expected.to(row.dtype))


def operands(masked: bool, grad: bool) -> tuple[Any, ...]:
    batch, steps, width = 2, 3, 16
    keep = padding(batch, steps).t().to(torch.uint8).contiguous() if masked else None
    floats = [torch.randn(*s) for s in ((6, 64), (2, 16), (2, 16), (64, width))]
    x, h0, c0, w = (f.requires_grad_(grad) for f in floats)
    return x, None, h0, c0, w, keep, [batch, steps, 16, 1, 0, int(grad)]


@pytest.mark.parametrize("masked", [False, True])
def test_operator_registration(masked: bool) -> None:
    operator = torch.ops.fusion_lm.lstm_rows.default
    torch.library.opcheck(operator, operands(masked, True))
    torch.library.opcheck(operator, operands(masked, False))


def test_survives_compilation() -> None:
    weights = nn.LSTM(4, 6, 1, batch_first=True).all_weights
    x, h0 = torch.randn(2, 5, 4), torch.randn(2, 5, 6)

    def both(x: Tensor, h0: Tensor) -> Tensor:
        zeros = x.new_zeros(2, 1, 6)
        out, _ = lstm_sequence(x, (zeros, zeros), weights, backend="triton")
        return out + prefix_lstm(x, h0, h0, weights, backend="triton")

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, h0), both(x, h0))
    got = torch.autograd.grad(compiled(x, h0).sum(), weights[0])
    expected = torch.autograd.grad(both(x, h0).sum(), weights[0])
    torch.testing.assert_close(got, expected)


# Two programs, two groups; chunks beyond the width, with a peek or not.
FORWARD = [
    configs.SequenceConfig(8, 8, 2, 16, 2, True),
    configs.SequenceConfig(8, 8, 2, 16, 4, False),
    configs.SequenceConfig(8, 32, 8, 128, 1, True),
]
BACKWARD = [
    configs.SequenceConfig(8, 16, 2, 16, 2, True),
    configs.SequenceConfig(8, 16, 2, 64, 5, True),
    configs.SequenceConfig(8, 32, 8, 64, 4, True),
]


def filled(batch: int, steps: int, dtype: torch.dtype, masked: bool) -> tuple[Any, Any]:
    """What a layer of 16 units is given: random, the outputs NaN."""
    m, width = steps * batch, 16
    rows = layout.Rows(batch, steps, 1)
    keep = padding(batch, steps).t().to(torch.uint8).contiguous() if masked else None

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(kind)

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.full(shape, float("nan"), dtype=kind)

    w, h, c = random(64, width), empty(batch + m, width), random(batch, width, kind=torch.float32)
    h[:batch] = random(batch, width)
    c_saved = empty(batch + m, width, kind=torch.float32)
    c_saved[:batch] = c
    gates = empty(m, 64)
    forward = layout.Forward(random(m, 64), None, w, h, c, keep, c_saved, gates, rows, True, 8)
    dh, grad, held = random(batch + m, width), empty(m, 64), torch.zeros(batch, width)
    saved = random(batch + m, width, kind=torch.float32), random(m, 64).sigmoid()
    dc = random(batch, width, kind=torch.float32)
    return forward, layout.Backward(dh, dc, w, *saved, keep, grad, held, rows, 8)


def same_as_the_equations(args: Any, config: configs.SequenceConfig) -> None:
    """Run twice over the same memory: the second finds what the first wrote."""
    forward = isinstance(args, layout.Forward)
    run = triton_sequence.sequence_forward if forward else triton_backward.sequence_backward
    plain = lstm_naive.plain_forward if forward else lstm_naive.plain_backward
    got, expected = args.trial(), args.trial()
    for _ in range(2):
        if not forward:
            got.held.zero_(), expected.held.zero_()  # as they are to be given
        with concurrent_programs():
            run(got, config)
        plain(expected)
        for name in args.written:
            wide = torch.finfo(args.w.dtype).bits == 32
            a, b = getattr(got, name).float(), getattr(expected, name).float()
            torch.testing.assert_close(a, b, atol=1e-5 if wide else 6e-2, rtol=0, equal_nan=True)
    told = got.h[args.rows.batch :] if forward else got.grad
    assert (told.view(torch.int32) != -1).all()  # or nobody would know that it is written


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", range(3))
def test_launches_in_groups_phases_and_with_a_peek(index: int, dtype: torch.dtype) -> None:
    assert [c.peek for c in FORWARD] == [c.peek for c in BACKWARD] == [False, False, True]
    forward, backward = filled(FORWARD[index].columns + 3, 3, dtype, True)
    same_as_the_equations(forward, FORWARD[index])
    same_as_the_equations(backward, BACKWARD[index])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_given_is_taken_for_unwritten(dtype: torch.dtype) -> None:
    """All ones, the mark of what nobody has written, and other NaNs: in states, held or not."""
    forward, backward = filled(3, 4, dtype, True)
    mark = torch.full((16,), -1, dtype=torch.int32).view(dtype)[:16]
    forward.h[0], forward.c[1, 3] = mark, float("nan")  # row 0 holds it for half of the steps
    forward.x_gates[3 * 2 + 2] = mark.repeat(4)
    backward.dh[3 * 4 + 1], backward.dc[2, 5] = mark, float("nan")
    backward.gates[4] = mark.repeat(4)
    same_as_the_equations(forward, FORWARD[0])
    same_as_the_equations(backward, BACKWARD[0])


def test_a_launch_gives_up_waiting() -> None:
    """Too few programs for what a kernel waits for: it ends, and the rest is wrong."""
    hidden, units = 16, 8
    config = configs.SequenceConfig(units, 8, 2, 16, 1, True)
    case = Case(1, 3, 4, hidden, 1, torch.float32)
    w = layout.pack(case.flat[1], units)
    h, c = torch.zeros(4, hidden), torch.zeros(1, hidden)
    gates = torch.randn(3, 4 * hidden)

    def one_after_another(kernel: Any, grid: Any, args: Any, options: Any) -> None:
        kernel[grid](*args, **options)

    old = guards.spinning_runner
    with concurrent_programs():
        guards.spinning_runner = one_after_another
        rows = layout.Rows(1, 3, 1)
        args = layout.Forward(gates, None, w, h, c, None, None, None, rows, True, units)
        triton_sequence.sequence_forward(args, config, looks=3)
    assert guards.spinning_runner is old
