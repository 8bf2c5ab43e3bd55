"""Progress of long work on standard error, with time left: a bar, or a line now and then."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)
SECONDS_PER_LINE = 60  # where standard error is no terminal


class Update(Protocol):
    """Sets how much is done."""

    def __call__(self, done: int, total_or_text: int | str = "", /) -> None: ...


@contextmanager
def track(description: str, total: int, start: int = 0) -> Iterator[Update]:
    """A bar while the block runs; call the result with (done) or (done, text).

    Where standard error is no terminal, a line each minute. Of several processes one reports.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    main = os.environ.get("RANK", "0") == "0"
    bar = Progress(
        *columns, console=console, disable=not (main and sys.stderr.isatty()), transient=True
    )
    began = said = time.monotonic()
    with bar:
        task = bar.add_task(description, total=total, completed=start)

        def update(done: int, total_or_text: int | str = "", /) -> None:
            nonlocal said
            text = f", {total_or_text}" if isinstance(total_or_text, str) and total_or_text else ""
            bar.update(task, completed=done, description=description + text)
            now = time.monotonic()
            if main and bar.disable and now - said >= SECONDS_PER_LINE and done > start:
                said = now
                left = (now - began) * (total - done) / (done - start)
                share = f"{done:,} of {total:,}{text}"
                note(f"{description}: {share}; {_minutes(now - began)}, {_minutes(left)} left")

        yield update


def _minutes(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def note(text: str) -> None:
    """One line on standard error."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
