"""The reference recurrences against torch.nn.LSTM, and their gradients."""

import pytest
import torch
from fusion_model.kernels import (
    dropout,
    linear_cross_entropy,
    lstm_sequence,
    prefix_lstm,
    resolve_backend,
    target_log_probs,
)
from fusion_model.kernels.lstm import lstm_sequence_reference
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


def lstm(width: int, hidden: int, layers: int) -> nn.LSTM:
    return nn.LSTM(width, hidden, layers, batch_first=True).double()


def state(batch: int, layers: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, batch, layers, hidden, dtype=torch.float64).unbind(0)


SHAPES = [(1, 1, 3, 4, 1), (3, 7, 5, 6, 2), (2, 13, 9, 17, 3)]
NAMES = [f"B{b}-T{t}-D{d}-H{h}-L{layers}" for b, t, d, h, layers in SHAPES]


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=NAMES)
def test_sequence_is_torch_lstm(shape: tuple[int, ...], backend: str) -> None:
    b, t, d, h, layers = shape
    module, x, (h0, c0) = lstm(d, h, layers), torch.randn(b, t, d).double(), state(b, layers, h)
    expected, (hn, cn) = module(x, (h0.transpose(0, 1), c0.transpose(0, 1)))
    out, (h_last, c_last) = lstm_sequence(x, (h0, c0), module.all_weights, backend=backend)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(h_last, hn.transpose(0, 1))
    torch.testing.assert_close(c_last, cn.transpose(0, 1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_mask_holds_the_state(side: str) -> None:
    module, x, initial = lstm(4, 6, 2), torch.randn(3, 9, 4).double(), state(3, 2, 6)
    lengths = [9, 5, 1]
    mask = torch.zeros(3, 9)
    for row, n in enumerate(lengths):
        mask[row, slice(9 - n, 9) if side == "left" else slice(0, n)] = 1
    out, (h, c) = lstm_sequence(x, initial, module.all_weights, mask=mask)
    for row in range(3):
        own = (initial[0][row : row + 1].transpose(0, 1), initial[1][row : row + 1].transpose(0, 1))
        real = mask[row].bool()
        expected, (hn, cn) = module(x[row : row + 1, real], own)
        torch.testing.assert_close(out[row, real], expected[0])
        torch.testing.assert_close(h[row], hn[:, 0])
        torch.testing.assert_close(c[row], cn[:, 0])


@pytest.mark.parametrize("batch", [15, 16, 17, 33])
def test_bfloat16_rows_are_padded_without_a_trace(batch: int) -> None:
    """Such batches are padded on a CPU: results and gradients are those of float64."""
    exact = lstm(8, 12, 2)
    x, initial = torch.randn(batch, 5, 8).double(), state(batch, 2, 12)
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        weights = [[p.detach().to(dtype).requires_grad_() for p in w] for w in exact.all_weights]
        inputs = [t.to(dtype).requires_grad_() for t in (x, *initial)]
        backend = "reference" if dtype == torch.float64 else "torch"
        out, (h, c) = lstm_sequence(inputs[0], tuple(inputs[1:]), weights, backend=backend)
        leaves = [*inputs, *(p for w in weights for p in w)]
        gradients = torch.autograd.grad((out.square().sum() + h.sum() + c.sum()) / batch, leaves)
        results.append([out, h, c, *gradients])
    for expected, got in zip(*results, strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got.double(), expected, atol=0.05, rtol=0.05)


def test_autocast_runs_in_bfloat16_close_to_float32() -> None:
    module = nn.LSTM(8, 16, 1, batch_first=True)
    x, zeros = torch.randn(4, 6, 8), torch.zeros(4, 1, 16)
    exact, _ = lstm_sequence(x, (zeros, zeros), module.all_weights)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = lstm_sequence(x, (zeros, zeros), module.all_weights)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=2e-2, rtol=2e-2)


def test_torch_lstm_sees_no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own on a GPU computes in float16 whatever was asked for."""
    seen = []
    lstm = torch.lstm

    def spy(*args):
        seen.append((torch.is_autocast_enabled("cpu"), args[0].dtype))
        return lstm(*args)

    monkeypatch.setattr(torch, "lstm", spy)
    module, zeros = nn.LSTM(8, 16, 1), torch.zeros(4, 1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        lstm_sequence(torch.randn(4, 6, 8), (zeros, zeros), module.all_weights)
    assert seen == [(False, torch.bfloat16)]


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_cudnn_is_asked_for(
    dtype: torch.dtype, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training mode if a backward pass may follow; bfloat16 weights in one piece, as `nn.LSTM`
    has others. The tensors are of a GPU, and have no contents."""
    moved, modes = [], []

    def lstm(x, state, weights, biases, layers, dropout, train, *rest):
        modes.append(train)
        raise NotImplementedError

    monkeypatch.setattr(torch, "lstm", lstm)
    monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", lambda *args: moved.append(args))
    with FakeTensorMode(), torch.set_grad_enabled(gradients):
        shapes = [(64, 16), (64, 16), (64,), (64,)]
        weights = [[torch.empty(s, device="cuda", dtype=dtype) for s in shapes] for _ in range(2)]
        x, zeros = (torch.empty(1, n, 16, device="cuda", dtype=dtype) for n in (6, 2))
        with pytest.raises(NotImplementedError):
            lstm_sequence(x, (zeros, zeros), weights, backend="torch")
    assert modes == [gradients]
    if dtype == torch.float16:
        assert not moved
    else:
        [(flat, *sizes)] = moved
        assert list(map(id, flat)) == [id(p) for layer in weights for p in layer]
        assert sizes == [4, 16, 2, 16, 0, 2, True, False]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_masks_of_any_form(backend: str) -> None:
    """Holes, a row without a token; outputs, final states and gradients as of the equations."""
    module, x, initial = lstm(4, 6, 2), torch.randn(5, 7, 4).double(), state(5, 2, 6)
    mask = torch.rand(5, 7) > 0.4
    mask[1], mask[2] = False, True
    found = []
    for name in (backend, "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, *initial)]
        out, last = lstm_sequence(
            leaves[0], (leaves[1], leaves[2]), module.all_weights, mask=mask, backend=name
        )
        total = sum((o * o).sum() for o in (out, *last))
        found.append([out, *last, *torch.autograd.grad(total, [*leaves, *module.parameters()])])
    torch.testing.assert_close(*found)
    for row in range(5):  # by itself, without what is masked
        own = tuple(s[row : row + 1].transpose(0, 1) for s in initial)
        real = mask[row]
        expected = module(x[row : row + 1, real], own)[0][0] if real.any() else x.new_empty(0, 6)
        torch.testing.assert_close(found[0][0][row, real], expected)


def test_dropout_acts_between_layers_only() -> None:
    x, zeros = torch.randn(2, 5, 4).double(), torch.zeros(2, 2, 6).double()
    module = lstm(4, 6, 2)
    for backend in ("torch", "reference"):
        plain, _ = lstm_sequence(x, (zeros, zeros), module.all_weights, backend=backend)
        dropped, (h, _) = lstm_sequence(
            x, (zeros, zeros), module.all_weights, backend=backend, dropout=0.5
        )
        assert not torch.equal(plain, dropped)
        first = lstm_sequence(x, (zeros[:, :1], zeros[:, :1]), module.all_weights[:1])[1][0]
        torch.testing.assert_close(h[:, :1], first)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_prefix_lstm_is_one_lstm_a_prefix(layers: int, start: int, padded: bool) -> None:
    b, t, d, h = 2, 6, 3, 5
    module, x = lstm(d, h, layers), torch.randn(b, t, d).double()
    h0, c0 = torch.randn(2, b, t - start, h, dtype=torch.float64).unbind(0)
    mask = torch.ones(b, t)
    mask[0, :2] = 0 if padded else 1
    out = prefix_lstm(x, h0, c0, module.all_weights, mask=mask if padded else None)
    assert out.shape == (b, t - start, h)
    for row in range(b):
        for r in range(t - start):
            real = mask[row, : start + r + 1].bool()
            if not real.any():
                continue
            own = [s[row, r].expand(layers, 1, h).contiguous() for s in (h0, c0)]
            expected, _ = module(x[row : row + 1, : start + r + 1][:, real], tuple(own))
            torch.testing.assert_close(out[row, r], expected[0, -1])


def test_gradients() -> None:
    module, (h0, c0) = lstm(3, 4, 2), state(2, 2, 4)
    weights = [w for layer in module.all_weights for w in layer]
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)

    def sequence(x, h0, c0, *flat):
        return lstm_sequence_reference(x, (h0, c0), [flat[:4], flat[4:]])[0]

    def prefixes(x, rows, *flat):
        return prefix_lstm(x, rows, rows, [flat[:4], flat[4:]])

    inputs = (x, h0.clone().requires_grad_(), c0.clone().requires_grad_(), *weights)
    assert torch.autograd.gradcheck(sequence, inputs)
    assert torch.autograd.gradcheck(prefixes, (x, rows, *weights))


@pytest.mark.parametrize("n", [0, 1, 3, 4, 9])
def test_target_log_probs(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 4)
    monkeypatch.setattr(linear_cross_entropy, "ROWS", 3)
    x, w, b = torch.randn(n, 5), torch.randn(11, 5), torch.randn(11)
    y = torch.randint(11, (n,))
    wide = torch.log_softmax(x.double() @ w.double().T + b.double(), -1)
    expected = wide[torch.arange(n), y]
    torch.testing.assert_close(target_log_probs(x, w, b, y).double(), expected, atol=1e-5, rtol=0)
    w.requires_grad_()
    trained = target_log_probs(x, w, b, y)
    torch.testing.assert_close(trained.double(), expected, atol=1e-5, rtol=0)
    if n:
        trained.sum().backward()
        probabilities = wide.exp()
        one_hot = torch.nn.functional.one_hot(y, 11)
        expected = (one_hot - probabilities).T @ x.double()
        torch.testing.assert_close(w.grad.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [-300.0, -75.0, 75.0, 300.0, 3e4])
def test_log_probs_of_logits_whose_exponentials_leave_float32(shift: float) -> None:
    x, w, b = torch.randn(5, 4), torch.randn(7, 4, requires_grad=True), torch.randn(7)
    y = torch.randint(7, (5,))
    wide = w.detach().double().requires_grad_()
    exact = torch.log_softmax(x.double() @ wide.T + (b + shift).double(), -1)
    expected = exact.gather(1, y[:, None])[:, 0]
    got = target_log_probs(x, w, b + shift, y)
    tolerance = dict(atol=1e-5 + abs(shift) * 1e-6, rtol=0)
    torch.testing.assert_close(got.double(), expected, **tolerance)
    gradients = [torch.autograd.grad(p.sum(), t)[0] for p, t in ((got, w), (expected, wide))]
    torch.testing.assert_close(gradients[0].double(), gradients[1], **tolerance)


def test_target_log_probs_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 4)
    monkeypatch.setattr(linear_cross_entropy, "ROWS", 3)
    x, w, b = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((9, 5), (11, 5), (11,))
    )
    y = torch.randint(11, (9,))
    assert torch.autograd.gradcheck(lambda x, w, b: target_log_probs(x, w, b, y), (x, w, b))
    assert torch.autograd.gradcheck(lambda x, w: target_log_probs(x, w, None, y), (x, w))


@pytest.mark.parametrize("n", [3, 9])
def test_target_log_probs_backward_twice(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of the forward pass are given away at the first one."""
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 4)
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((n, 5), (11, 5), (11,)))
    y = torch.randint(11, (n,))
    loss = target_log_probs(x, w, b, y).mean()
    first = torch.autograd.grad(loss, (x, w, b), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (x, w, b))
    expected = torch.log_softmax(x @ w.T + b, -1).gather(1, y[:, None]).mean()
    for a, c, d, e in zip(
        first, kept, second, torch.autograd.grad(expected, (x, w, b)), strict=True
    ):
        assert torch.equal(a, c)
        torch.testing.assert_close(a, e)
        torch.testing.assert_close(d, e)


def test_target_log_probs_under_autocast() -> None:
    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((9, 16), (11, 16), (11,)))
    y = torch.randint(11, (9,))
    exact = torch.log_softmax(x @ w.T + b, -1).gather(1, y[:, None])[:, 0]
    expected = torch.autograd.grad(exact.sum(), (x, w, b))
    with torch.autocast("cpu", torch.bfloat16):
        got = target_log_probs(x, w, b, y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact, atol=0.05, rtol=0.02)
    for a, e in zip(torch.autograd.grad(got.sum(), (x, w, b)), expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, e, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout(p: float, dtype: torch.dtype) -> None:
    x = torch.ones(1001, 300, dtype=dtype)
    y = dropout(x, p, True)
    kept = y != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.005)
    torch.testing.assert_close(y[kept].float(), torch.full_like(y[kept].float(), 1 / (1 - p)),
                               rtol=0.01, atol=0)  # fmt: skip
    columns, rows = kept.float().mean(0), kept.float().mean(1)
    assert float(columns.std()) == pytest.approx((p * (1 - p) / 1001) ** 0.5, rel=0.2)
    assert float(rows.std()) == pytest.approx((p * (1 - p) / 300) ** 0.5, rel=0.2)
    assert torch.equal(dropout(x, p, False), x)
    assert not torch.equal(dropout(x, p, True), y)
    torch.manual_seed(3)
    once = dropout(x, p, True)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, p, True), once)


def test_dropout_at_the_ends_and_its_gradient() -> None:
    x = torch.randn(7, 5, requires_grad=True)
    assert dropout(x, 0.0, True) is x or torch.equal(dropout(x, 0.0, True), x)
    assert not dropout(x, 1.0, True).any()
    y = dropout(x, 0.5, True)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.where(y == 0, 0.0, 2.0))


def test_low_precision_logits_are_normalised_in_float32() -> None:
    x, w = torch.randn(50, 16).bfloat16(), torch.randn(40, 16).bfloat16()
    y = torch.randint(40, (50,))
    got = target_log_probs(x, w, None, y)
    logits = (x.double() @ w.double().T).bfloat16().double()
    expected = torch.log_softmax(logits, -1)[torch.arange(50), y]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


def test_choice_of_backend() -> None:
    assert resolve_backend("auto", "cpu") == resolve_backend("auto", "cpu", 2) == "torch"
    assert resolve_backend("auto", "cpu", 1) == "reference"
    assert resolve_backend("auto", "cuda", 1) == "torch"
    for named in ("torch", "reference"):
        assert resolve_backend(named, "cpu", 1) == resolve_backend(named, "cuda", 9) == named


def test_unknown_backend_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"unknown backend 'cudann'.*auto, torch, cudnn, triton, reference"
    ):
        resolve_backend("cudann", "cpu")
