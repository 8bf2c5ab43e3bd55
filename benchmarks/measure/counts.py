"""Bytes that must move and operations that must be done: what no implementation can save.

Compulsory traffic only: every input and weight read once, every output written once. A
recurrence re-reads its matrix each step unless a cache or registers hold it, which is why the
fraction of this floor that is reached tells how well they do. A multiply-add counts as two.
"""

from dataclasses import dataclass

SIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@dataclass(frozen=True)
class Counts:
    """Of one call.

    Attributes:
        held: bytes of the memory that is read, each counted once however often it is read: what
            a cache must hold (default: all bytes are read once).
    """

    flops: float
    bytes: float
    held: float | None = None

    @property
    def reach(self) -> float:
        """`held`, as a number."""
        return self.bytes if self.held is None else self.held

    def __add__(self, other: "Counts") -> "Counts":
        reach = self.reach + other.reach
        return Counts(self.flops + other.flops, self.bytes + other.bytes, reach)

    def times(self, n: float) -> "Counts":
        return Counts(n * self.flops, n * self.bytes, self.reach)


def matmul(rows: float, inner: int, outer: int, size: int) -> Counts:
    """[rows, inner] times [inner, outer], plus a bias."""
    moved = rows * (inner + outer) + inner * outer + outer
    return Counts(2.0 * rows * inner * outer, float(moved * size))


def lstm(rows: float, steps: float, width: int, hidden: int, size: int) -> Counts:
    """`steps` steps in all over `rows` states; weights [4H, width] and [4H, H], read once."""
    weights = 4 * hidden * (width + hidden + 2)
    moved = weights + steps * (width + hidden) + 4 * rows * hidden
    return Counts(8.0 * steps * hidden * (width + hidden), float(moved * size))
