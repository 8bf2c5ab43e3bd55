"""Resampling, and the scipy and statsmodels tests that reports use.

Documents and seeds are both drawn: a difference between arms should hold for other texts and for
other random numbers. Of n, n - 1 are drawn with replacement, which makes the variance of a mean
unbiased (Rao & Wu 1988); with n of n, an interval over three seeds is a fifth too narrow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 4000
Name = TypeVar("Name")


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, and where there is a test, p (two-sided)."""

    value: float
    low: float
    high: float
    p: float | None = None


def draws(n: int, generator: np.random.Generator) -> np.ndarray:
    """How often each of n is drawn, [1 + RESAMPLES, n]; the first row is the sample itself."""
    if n == 1:
        return np.ones((1 + RESAMPLES, 1))
    drawn = generator.multinomial(n - 1, np.full(n, 1 / n), size=RESAMPLES)
    return np.concatenate([np.ones((1, n)), drawn])


def resampled_means(
    sums: Mapping[Name, np.ndarray], weights: np.ndarray, seed: int = 0
) -> dict[Name, np.ndarray]:
    """Means as they are, and as they would be with other documents and other seeds.

    Documents are drawn alike for all arms, also in another call for the same documents, so that
    what is computed of several is paired; seeds are drawn for each arm on its own.

    Args:
        sums: by arm, the sum over each document with each seed, [S, D].
        weights: tokens or words of each document, [D].

    Returns:
        By arm, [1 + RESAMPLES], the mean itself first.
    """
    documents = draws(len(weights), np.random.default_rng([seed, 0]))
    found = {}
    for i, (name, values) in enumerate(sums.items()):
        of_seeds = draws(len(values), np.random.default_rng([seed, i + 1]))
        means = documents @ values.T / (documents @ weights)[:, None]
        found[name] = (means * of_seeds).sum(axis=1) / of_seeds.sum(axis=1)
    return found


def estimate(values: np.ndarray, confidence: float = CONFIDENCE) -> Estimate:
    """Of a statistic [1 + RESAMPLES], the value first: percentile interval, and p of 0."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[1:], [tail, 1 - tail])
    least = min((values[1:] <= 0).sum(), (values[1:] >= 0).sum())
    p = min(2 * (int(least) + 1) / len(values), 1.0)
    return Estimate(float(values[0]), float(low), float(high), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for several tests (Holm, statsmodels)."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return []
    return [float(p) for p in multipletests(list(p_values), method="holm")[1]]


def verdict(difference: np.ndarray, margin: np.ndarray | float) -> str:
    """`better`, `worse`, `equivalent` or `undecided`, of a difference [1 + RESAMPLES].

    Equivalent: it lies within ± `margin`, which may be drawn with it (two one-sided tests at 5 %).
    """
    e = estimate(difference)
    above, below = estimate(difference + margin, 0.9), estimate(difference - margin, 0.9)
    if e.low > 0 or e.high < 0:
        return "better" if e.value > 0 else "worse"
    return "equivalent" if above.low > 0 > below.high else "undecided"
