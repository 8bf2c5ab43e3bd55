"""Copies between the CPU and a GPU that wait for nothing; on the CPU there is nothing to copy.

A plain copy to the GPU waits until all that was asked of it is done. From pinned memory it does
not, so that the next batch is prepared and sent while the one before it is computed. Results come
back on a stream of their own, beside the next batch's work.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

B = TypeVar("B")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device, without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Returns:
    """Brings results to the CPU.

    Args:
        device: where they are made.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def ahead(self) -> int:
        """Batches that may be under way before the first one's result is waited for."""
        return 0 if self._stream is None else 1

    def start(self, found: Tensor) -> Callable[[], Tensor]:
        """Begin to bring a result; what this gives waits for it: float32, on the CPU."""
        if self._stream is None:
            arrived = found.float().cpu()
            return lambda: arrived
        self._stream.wait_stream(torch.cuda.current_stream(found.device))
        with torch.cuda.stream(self._stream):
            buffer = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            buffer.copy_(found, non_blocking=True)
            found.record_stream(self._stream)  # its memory is not used again before that
            done = self._stream.record_event()

        def wait() -> Tensor:
            done.synchronize()
            return buffer.float()

        return wait


def overlapped(
    batches: Iterable[B], start: Callable[[B], Callable[[], Tensor]], ahead: int
) -> Iterator[tuple[B, Tensor]]:
    """Batches with their results, in order; up to `ahead` more are started before one is awaited.

    An error ends it; what had been started is not waited for then.
    """
    under_way: deque[tuple[B, Callable[[], Tensor]]] = deque()
    for batch in batches:
        under_way.append((batch, start(batch)))
        if len(under_way) > ahead:
            first, wait = under_way.popleft()
            yield first, wait()
    for first, wait in under_way:
        yield first, wait()
