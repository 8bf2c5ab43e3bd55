"""Bytes that must move and operations that must be done: what no implementation can save.

Compulsory traffic only: every input and weight read once, every output written once. A
recurrence re-reads its matrix each step unless a cache or registers hold it, which is why the
fraction of this floor that is reached tells how well they do. A multiply-add counts as two.
"""

from dataclasses import dataclass

from fusion_model.benchmarks.suite.cases import Case

SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Counts:
    """Of one call."""

    flops: float
    bytes: float

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, n: float) -> "Counts":
        return Counts(n * self.flops, n * self.bytes)


def matmul(rows: float, inner: int, outer: int, size: int) -> Counts:
    """[rows, inner] times [inner, outer], plus a bias."""
    moved = rows * (inner + outer) + inner * outer + outer
    return Counts(2.0 * rows * inner * outer, float(moved * size))


def lstm(rows: float, steps: float, width: int, hidden: int, size: int) -> Counts:
    """`steps` steps in all over `rows` states; weights [4H, width] and [4H, H], read once."""
    weights = 4 * hidden * (width + hidden + 2)
    moved = weights + steps * (width + hidden) + 4 * rows * hidden
    return Counts(8.0 * steps * hidden * (width + hidden), float(moved * size))


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
    if case.operation == "head":
        return Counts(head.flops, float(size * (v * d + v + b * t * d) + 12 * b * t))
    layers = (matmul(b * t, h + e, d, size), lstm(b, b * t, d, h, size))
    forward = sum(layers, head)
    parameters = v * d + 4 * h * (d + h + 2) + d * (h + e + 1) + v * (d + 1)
    adam = Counts(12.0 * parameters, 4.0 * 7 * parameters)  # reads p, g, m, v; writes p, m, v
    return forward.times(3) + adam  # a backward pass is two products for each forward one
