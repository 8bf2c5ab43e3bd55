"""Settings are chosen by the dev loss of runs with seed 0."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol, TypeVar

Settings = dict[str, float]
"""By field of `TrainingOptions`."""
WHOLE = 8  # grids of no more points in all are searched whole


class Unfinished(Exception):
    """A run that only a report was wanted of has not been made."""


class Tuned(Protocol):
    """A run, as far as tuning reads it."""

    @property
    def dev_loss(self) -> float: ...


R = TypeVar("R", bound=Tuned)


def search(
    run: Callable[[Settings], R], middle: Settings, grids: Mapping[str, Sequence[float]]
) -> R:
    """The run with the settings that are best on dev.

    Of few settings, all are tried. Else from the middle of every grid, one field after the other:
    a step up while dev gains by it, or else down. So a chosen value is better than both its
    neighbours, unless it lies at the edge of its grid.

    Args:
        grids: ascending values of what is tuned.

    Raises:
        Unfinished: there are no runs.
    """
    if math.prod(map(len, grids.values())) <= WHOLE:
        points = itertools.product(*grids.values())
        return best_of(run, [middle | dict(zip(grids, point, strict=True)) for point in points])
    settings, best = dict(middle), run(middle)
    for name, grid in grids.items():
        start = grid.index(middle[name])
        for step in (1, -1):
            at = start + step
            while 0 <= at < len(grid):
                other = run(settings | {name: grid[at]})
                if other.dev_loss >= best.dev_loss:
                    break
                best, settings[name], at = other, grid[at], at + step
            if settings[name] != grid[start]:
                break
    return best


def best_of(run: Callable[[Settings], R], points: Iterable[Settings]) -> R:
    """The run of least dev loss, of those that are there.

    Raises:
        Unfinished: none is.
    """
    runs = []
    for point in points:
        with suppress(Unfinished):
            runs.append(run(point))
    if not runs:
        raise Unfinished
    return min(runs, key=lambda found: found.dev_loss)
