"""Named stretches of time, recorded by wrapping functions of live objects.

The code under the clock stays as it is: an attribute is replaced while a block runs and put
back after. Times are exclusive: what a nested span takes is not counted in the outer one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

# `replaced(object, attribute, value)`: another value while the block runs, the old one after it.
replaced = patch.object


@dataclass(frozen=True)
class Span:
    """A stretch of time, for a trace."""

    name: str
    start: float
    end: float


class Recorder:
    """Collects spans, and exclusive seconds by name since the last `take`.

    Args:
        clock: seconds.
        synchronize: waits for the device, so that its work counts where it was asked for.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self._clock, self._synchronize = clock, synchronize
        self._inner: list[float] = []  # seconds of what is nested in each open span
        self._own: dict[str, float] = {}
        self.spans: list[Span] = []

    def now(self) -> float:
        """Seconds, once the device has done what it was asked to."""
        if self._synchronize:
            self._synchronize()
        return self._clock()

    def take(self) -> dict[str, float]:
        """Exclusive seconds by name of the spans that closed since the last call."""
        own, self._own = self._own, {}
        return own

    def spanned(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, with a span around each call."""

        def call(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                end = self.now()
                self._own[name] = self._own.get(name, 0.0) + end - start - self._inner.pop()
                if self._inner:
                    self._inner[-1] += end - start
                self.spans.append(Span(name, start, end))

        return call

    @contextmanager
    def around(self, *targets: tuple[Any, str, str]) -> Iterator[None]:
        """Spans around functions: (object or module, attribute, name of the span) of each."""
        with ExitStack() as stack:
            for owner, attribute, name in targets:
                wrapped = self.spanned(getattr(owner, attribute), name)
                stack.enter_context(replaced(owner, attribute, wrapped))
            yield
