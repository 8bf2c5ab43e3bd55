"""A case made ready: what is called, how its result is checked, and what it costs at least."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from fusion_model.benchmarks.measure.counts import SIZE, Counts, lstm, matmul
from fusion_model.benchmarks.suite.cases import Case
from torch import Tensor

T = TypeVar("T")


class Unavailable(Exception):
    """A case that this machine cannot run, and why."""


class WrongResult(AssertionError):
    """A backend whose result is not the reference's: it is not timed."""


@dataclass(frozen=True)
class Work:
    """One call of it processes `items`.

    Attributes:
        run: what is timed.
        result: the same call's result as numbers, [...], for comparison.
        expected: what a reference gives, computed once for a group.
        counts: bytes and operations that no implementation can save.
        tolerance: largest difference, relative to the largest expected number.
        facts: more for the record, complete once `check` was called.
    """

    run: Callable[[], Any]
    result: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    items: int
    counts: Counts
    tolerance: float
    facts: dict[str, Any] = field(default_factory=dict)

    def check(self) -> float:
        """Seconds of the first call, whose result is compared: compilation, cold caches.

        Raises:
            WrongResult: it is above the tolerance, or not a number.
        """
        start = time.perf_counter()
        got = self.result().double().cpu()
        first, expected = time.perf_counter() - start, self.expected().double().cpu()
        if got.shape != expected.shape:
            raise WrongResult(f"shape {list(got.shape)}, expected {list(expected.shape)}")
        scale = float(expected.abs().max())
        error = float((got - expected).abs().max()) / max(scale, 1e-30)
        if not error <= self.tolerance:
            raise WrongResult(
                f"differs from the reference by {error:.2g}; {self.tolerance:.2g} is allowed"
            )
        return first


def of_case(case: Case) -> Counts:
    """Of an operation on a shape."""
    size, b, t = SIZE[case.dtype], case.batch, case.length
    d, h, v, e = case.embedding_size, case.hidden_size, case.vocab_size, case.prefix_size
    if case.operation in ("step", "sequence"):
        return lstm(b, b * t, d, h, size)
    if case.operation == "prefixes":
        steps = b * t * (t + 1) / 2
        # Input gates once a token; the recurrence once a prefix and step.
        recurrence = Counts(8.0 * steps * h * h, float(size * (4 * h * h + 3 * b * t * h)))
        return matmul(b * t, d, 4 * h, size) + recurrence
    head = matmul(b * t, d, v, size)
    head = Counts(head.flops, float(size * (v * d + v + b * t * d) + 12 * b * t))
    if case.operation == "head":
        return head
    forward = matmul(b * t, h + e, d, size) + lstm(b, b * t, d, h, size) + head
    if case.operation == "evaluation":
        return forward
    parameters = v * d + 4 * h * (d + h + 2) + d * (h + e + 1) + v * (d + 1)
    adam = Counts(12.0 * parameters, 4.0 * 7 * parameters)  # reads p, g, m, v; writes p, m, v
    return forward.times(3) + adam  # a backward pass is two products for each forward one


TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 1e-2}


@dataclass
class Context:
    """What cases share: where they run, and the model and text of those that need them.

    Attributes:
        device: `cpu`, `cuda`.
        model: saved model, for the cases on text.
        sentences: text of those cases.
        scratch: folder for exports.
        new_tokens: how many are generated.
        cache: what was made once, by name.
        closing: what ends with the run.
    """

    device: str
    model: str
    sentences: list[str]
    scratch: Path
    new_tokens: int = 32
    cache: dict[Any, Any] = field(default_factory=dict)
    closing: ExitStack = field(default_factory=ExitStack)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Make something once; a reason not to be able to is kept, too."""
        if key not in self.cache:
            try:
                self.cache[key] = make()
            except Unavailable as reason:
                self.cache[key] = reason
        found: T = self.cache[key]
        if isinstance(found, Unavailable):
            raise found
        return found

    def forget(self) -> None:
        """Give up what belongs to one group."""
        self.cache = {k: v for k, v in self.cache.items() if not isinstance(k, tuple)}


def check_backend(name: str, device: str) -> None:
    """Raise `Unavailable` for one of our backends that cannot run here."""
    from fusion_model.kernels import resolve_backend

    try:
        resolve_backend(name, device)
    except (ValueError, RuntimeError, ImportError) as reason:
        raise Unavailable(str(reason).splitlines()[0]) from None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile; a call raises `Unavailable` where that does not work."""
    torch._dynamo.reset()  # else a ninth shape would silently run uncompiled
    fast = torch.compile(function)

    def call(*args: Tensor) -> Any:
        try:
            return fast(*args)
        except Exception as error:  # no C++ compiler, no Triton: of many kinds
            first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
            raise Unavailable(f"torch.compile does not work here: {first[:120]}") from None

    return call
