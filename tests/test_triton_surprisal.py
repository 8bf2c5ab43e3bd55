"""The surprisal kernels in Triton's interpreter, against log_softmax over whole logits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fusion_model.kernels import target_log_probs
from torch import Tensor
from triton_bf16 import right_bfloat16

pytest.importorskip("triton")

from fusion_model.kernels.triton import linear_cross_entropy


@pytest.fixture(autouse=True)
def _bfloat16() -> Iterator[None]:
    with right_bfloat16():
        yield


SHAPES = [(0, 16, 20), (1, 16, 1), (37, 50, 300), (129, 64, 128)]


def exact(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    return torch.log_softmax(torch.nn.functional.linear(x, w, b), -1).gather(1, y[:, None])[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_error_of_whole_logits(
    shape: tuple[int, ...], biased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_cross_entropy, "CHUNK", 50)  # gradients in three parts
    n, d, v = shape
    inputs = [torch.randn(*s).to(dtype) for s in ((n, d), (v, d), (v,))]
    y, upstream = torch.randint(v, (n,)), torch.randn(n)
    results = []
    for kind, run in (
        (torch.float64, exact),
        (dtype, exact),
        (dtype, lambda *a: target_log_probs(*a, backend="triton")),
    ):
        leaves = [t.to(kind).requires_grad_() for t in inputs[: 3 if biased else 2]]
        x, w, *bias = leaves
        out = run(x, w, bias[0] if biased else None, y)
        gradients = torch.autograd.grad((out * upstream).sum(), leaves)
        results.append([t.double() for t in (out, *gradients)])
    small = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for wanted, eager, kernel in zip(*results, strict=True):
        if wanted.numel():
            budget = (eager - wanted).abs().max() + small * (wanted.abs().max() + 1)
            assert (kernel - wanted).abs().max() <= budget


def operands(grad: bool) -> list[Any]:
    floats = [torch.randn(*s).requires_grad_(grad) for s in ((5, 16), (20, 16), (20,))]
    return [*floats, torch.randint(20, (5,))]


@pytest.mark.parametrize("grad", [True, False])
def test_operator_registration(grad: bool) -> None:
    torch.library.opcheck(torch.ops.fusion_lm.surprisal_forward.default, operands(grad))


def test_survives_compilation() -> None:
    x, w, b, y = operands(True)

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return -target_log_probs(x, w, b, y, backend="triton").mean()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(x, w, b), (x, w, b))
    got = torch.autograd.grad(compiled(x, w, b), (x, w, b))
    torch.testing.assert_close(got, expected)


def test_logits_far_apart_stay_finite() -> None:
    x, w = torch.tensor([[300.0], [-300.0]]), torch.tensor([[1.0], [-1.0], [0.5]])
    got = target_log_probs(x, w, None, torch.tensor([1, 1]), backend="triton")
    torch.testing.assert_close(got, torch.tensor([-600.0, 0.0]))
