"""Correctness of the kernels on the device at hand: cases, and what each must show.

A case is a name and a function that returns a result: a dict with `ok` and figures. Every case can
be built and run on a CPU under Triton's interpreter too, which is how the tests try this file.

Notation: B sequences, T steps, D input width, H hidden width, V vocabulary.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from fusion_model.kernels.cuda_graphs import record
from fusion_model.kernels.linear_cross_entropy import target_log_probs
from fusion_model.kernels.lstm import lstm_sequence
from fusion_model.kernels.prefix_lstm import prefix_lstm
from fusion_model.kernels.triton.configs import chip_of, rows_plan
from torch import Tensor

Result = dict[str, Any]
Named = tuple[str, Callable[[], Result]]
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL = {"bf16": 2e-2, "fp16": 2e-3, "fp32": 5e-6}


@dataclass(frozen=True)
class Case:
    """One operation at one shape; `layers` and `masked` do not apply to surprisal."""

    operation: str  # sequence, prefix, surprisal
    dtype: str
    batch: int  # or positions N, for surprisal
    steps: int
    width: int
    hidden: int  # or vocabulary V, for surprisal
    layers: int = 1
    masked: bool = False
    training: bool = True

    def __str__(self) -> str:
        names = ("N", "", "D", "V") if self.operation == "surprisal" else ("B", "T", "D", "H")
        sizes = (self.batch, self.steps, self.width, self.hidden)
        shape = " ".join(f"{n}{s}" for n, s in zip(names, sizes, strict=True) if n)
        extra = f" L{self.layers}" * (self.layers > 1) + " padded" * self.masked
        mode = "" if self.training else " inference"
        return f"{self.operation} {self.dtype} {shape}{extra}{mode}"


def cases(operation: str) -> list[Case]:
    """The grid of one operation: every kind of launch, odd sizes, all dtypes."""
    if operation == "surprisal":
        shapes = [(1, 16, 20), (1000, 512, 8192), (777, 100, 5003), (4099, 650, 1000)]
        return [Case("surprisal", t, n, 0, d, v) for t in TYPES for n, d, v in shapes]
    if operation == "prefix":
        sizes = [(1, 1, 3, 5), (7, 13, 24, 100), (32, 25, 512, 768)]
        found = [Case("prefix", t, *size) for t in TYPES for size in sizes]
        return found + [Case("prefix", t, 5, 9, 64, 650, layers=2, masked=True) for t in TYPES]
    found = []  # sequences
    for t in TYPES:
        for shape in [(1, 3, 5), (16, 512, 768), (3, 650, 650), (17, 64, 512), (100, 32, 256)]:
            batch, width, hidden = shape
            found.append(Case("sequence", t, batch, 37, width, hidden))
        for batch, hidden in [(3, 650), (17, 512)]:
            found.append(Case("sequence", t, batch, 37, 64, hidden, masked=True))
        found.append(Case("sequence", t, 4, 19, 64, 768, layers=3))
    found.append(Case("sequence", "bf16", 64, 37, 64, 768, masked=True))  # backward in two groups
    for batch, hidden in [(8, 768), (16, 1024), (32, 1024), (64, 768), (128, 768), (256, 768),
                          (16, 1500), (300, 512)]:  # fmt: skip
        found.append(Case("sequence", "bf16", batch, 33, 64, hidden, training=False))
    return found


Run = Callable[[list[Tensor], str], list[Tensor]]


def build(case: Case, device: torch.device, seed: int = 0) -> tuple[list[Tensor], Run]:
    """Float leaves in the case's dtype, and what computes its outputs from them."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator) * scale
        return drawn.to(device, TYPES[case.dtype])

    if case.operation == "surprisal":
        n, d, v = case.batch, case.width, case.hidden
        leaves = [random(n, d), random(v, d, scale=d**-0.5), random(v)]
        y = torch.randint(v, (n,), generator=generator).to(device)
        return leaves, lambda t, backend: [target_log_probs(t[0], t[1], t[2], y, backend=backend)]
    b, t, d, h = case.batch, case.steps, case.width, case.hidden
    mask = None
    if case.masked:
        mask = torch.ones(b, t, device=device)
        mask[0, : t // 2] = 0
        mask[-1, t // 3 + 1 :] = 0
    rows = t if case.operation == "prefix" else case.layers
    leaves = [random(b, t, d), random(b, rows, h), random(b, rows, h)]
    for layer in range(case.layers):
        inner = d if layer == 0 else h
        shapes = ((4 * h, inner), (4 * h, h), (4 * h,), (4 * h,))
        leaves += [random(*shape, scale=h**-0.5) for shape in shapes]

    def run(tensors: list[Tensor], backend: str) -> list[Tensor]:
        x, h0, c0, *flat = tensors
        weights = [flat[i : i + 4] for i in range(0, len(flat), 4)]
        if case.operation == "prefix":
            return [prefix_lstm(x, h0, c0, weights, mask=mask, backend=backend)]
        out, last = lstm_sequence(x, (h0, c0), weights, mask=mask, backend=backend)
        return [out, *last]

    return leaves, run


def outputs(case: Case, leaves: list[Tensor], run: Run, kind: torch.dtype, backend: str) -> Any:
    """Outputs, and, in training, gradients of all leaves; detached."""
    leaves = [t.detach().to(kind).requires_grad_(case.training) for t in leaves]
    found = run(leaves, backend)
    if not case.training:
        return found
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), device=leaves[0].device, dtype=torch.float64)
    for out in found:
        upstream = torch.randn(out.shape, generator=generator).to(TYPES[case.dtype])
        total = total + (out * upstream.to(out.device, out.dtype)).sum(dtype=torch.float64)
    return [*(o.detach() for o in found), *torch.autograd.grad(total, leaves)]


def plan_of(case: Case, device: torch.device) -> str:
    if case.operation == "surprisal":
        return "tiles"
    rows = case.steps if case.operation == "prefix" else 1
    shape = (case.hidden, case.batch, rows, TYPES[case.dtype], case.steps, case.training)
    return "persistent" if rows_plan(chip_of(device), *shape).persistent else "a launch a step"


def of_budget(
    kernel: Iterable[Tensor], eager: Iterable[Tensor], exact: Iterable[Tensor], dtype: str
) -> float:
    """The worst |kernel - exact| as a share of what equations in the same dtype are off, or so."""
    shares = []
    for k, e, x in zip(kernel, eager, exact, strict=True):
        x = x.double()
        budget = 1.5 * (e.double() - x).abs().max() + SMALL[dtype] * (x.abs().max() + 1)
        shares.append(float((k.double() - x).abs().max() / budget))
    return max(shares, key=lambda share: (share != share, share))


def compare(case: Case, device: torch.device) -> Result:
    """|kernel - exact| against |equations in the same dtype - exact|; exact is float64."""
    leaves, run = build(case, device)
    kind = TYPES[case.dtype]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernel = outputs(case, leaves, run, kind, "triton")
    exact = outputs(case, leaves, run, torch.float64, "reference")
    eager = outputs(case, leaves, run, kind, "reference")
    share = of_budget(kernel, eager, exact, case.dtype)
    fallback = [str(w.message) for w in caught if "is not used on" in str(w.message)]
    return {
        "ok": share <= 1 and not fallback,  # NaN is not <= 1
        "of_budget": share,
        "plan": plan_of(case, device),
        "fallback": fallback,
        **asdict(case),
    }


def check(device: torch.device, operation: str, *dtypes: str) -> list[Named]:
    """The grid of an operation, in all dtypes or these: kernels against float64."""
    found = [case for case in cases(operation) if case.dtype in (dtypes or TYPES)]
    return [(str(case), partial(compare, case, device)) for case in found]


REPEATED = [
    Case("sequence", "bf16", 1, 128, 64, 768, training=False),
    Case("sequence", "bf16", 16, 64, 64, 768),
    Case("sequence", "bf16", 64, 64, 64, 768),
    Case("sequence", "bf16", 64, 64, 64, 768, training=False),
    Case("sequence", "bf16", 64, 32, 64, 1500, masked=True),
    Case("prefix", "bf16", 32, 16, 64, 768),
    Case("surprisal", "bf16", 1000, 0, 512, 8192),
]


def same(first: Sequence[Tensor], others: Iterable[Sequence[Tensor]]) -> Result:
    """Whether the others are the same bits as the first."""
    pairs = (zip(first, other, strict=True) for other in others)
    differing = sum(not all(torch.equal(a, b) for a, b in pair) for pair in pairs)
    return {"ok": not differing, "differing": differing}


def repeated(case: Case, device: torch.device, times: int) -> Result:
    leaves, run = build(case, device)
    found = (outputs(case, leaves, run, TYPES[case.dtype], "triton") for _ in range(times))
    return same(next(found), found)


def repeats(device: torch.device, times: int = 200) -> list[Named]:
    """The same bits every time."""
    return [(f"{times} times {case}", partial(repeated, case, device, times)) for case in REPEATED]


def replayed(case: Case, device: torch.device, times: int) -> Result:
    """A CUDA graph of the operation gives what it gave when it was launched."""
    leaves, run = build(case, device)
    expected = [t.clone() for t in run(leaves, "triton")]
    graph, captured = record(lambda: run(leaves, "triton"))

    def replays() -> Iterator[Sequence[Tensor]]:
        for _ in range(times):
            for tensor in captured:
                tensor.zero_()
            graph.replay()
            yield captured

    return same(expected, replays())


def replays(device: torch.device, times: int = 100) -> list[Named]:
    return [
        (f"{times} replays of {case}", partial(replayed, case, device, times))
        for case in REPEATED
        if not case.training
    ]
