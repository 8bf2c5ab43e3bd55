"""Progress of long work on standard error, with time left; silent where nobody looks."""

import os
import sys
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


class Update(Protocol):
    """Sets how much is done."""

    def __call__(self, done: int, total_or_text: int | str = "", /) -> None: ...


@contextmanager
def track(description: str, total: int, start: int = 0) -> Iterator[Update]:
    """A bar while the block runs; call the result with (done) or (done, text)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    quiet = os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty()
    with Progress(*columns, console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task(description, total=total, completed=start)

        def update(done: int, total_or_text: int | str = "", /) -> None:
            text = f", {total_or_text}" if isinstance(total_or_text, str) and total_or_text else ""
            bar.update(task, completed=done, description=description + text)

        yield update


def note(text: str) -> None:
    """One line on standard error."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
