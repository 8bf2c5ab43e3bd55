"""Tests and intervals: scipy and statsmodels, and the two resampling tests they lack."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, and where there is a test, p (two-sided)."""

    value: float
    low: float
    high: float
    p: float | None = None

    def scaled(self, factor: float) -> "Estimate":
        """In another unit; p stays."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor, self.p)


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean over seeds with the t interval (scipy); NaN bounds for a single value."""
    from scipy import stats

    x = np.asarray(values, dtype=float)
    mean = float(x.mean())
    if len(x) < 2:
        return Estimate(mean, float("nan"), float("nan"))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(x) - 1) * stats.sem(x))
    return Estimate(mean, mean - half, mean + half)


def paired_losses(ours: np.ndarray, theirs: np.ndarray, sentences: np.ndarray) -> Estimate:
    """Mean of per-token differences, ours - theirs; tokens of a sentence are one cluster.

    The intercept of an OLS with cluster-robust errors (statsmodels), t with clusters - 1 degrees
    of freedom. Losses of several seeds are averaged beforehand.

    Args:
        ours, theirs: losses of the same tokens, [N].
        sentences: which sentence each token is of, [N].
    """
    import statsmodels.api as sm

    difference = ours.astype(float) - theirs.astype(float)
    if not difference.any():
        return Estimate(0.0, 0.0, 0.0, 1.0)
    fit = sm.OLS(difference, np.ones(len(difference))).fit(
        cov_type="cluster", cov_kwds={"groups": sentences}, use_t=True
    )
    low, high = fit.conf_int(alpha=1 - CONFIDENCE)[0]
    return Estimate(float(fit.params[0]), float(low), float(high), float(fit.pvalues[0]))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for several tests (Holm, statsmodels)."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return []
    return [float(p) for p in multipletests(list(p_values), method="holm")[1]]


def bootstrap_groups(
    statistic: Callable[[np.ndarray], np.ndarray],
    groups: np.ndarray,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of statistics of rows, whole groups (stories) drawn with replacement.

    Args:
        statistic: rows [N] int -> values [K].
        groups: group of each row, [N].

    Returns:
        Lower and upper bounds, each [K].
    """
    rows = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(rows), size=(resamples, len(rows)))
    values = np.stack([statistic(np.concatenate([rows[i] for i in draw])) for draw in draws])
    tail = (1 - CONFIDENCE) / 2
    return np.quantile(values, tail, axis=0), np.quantile(values, 1 - tail, axis=0)


def sign_flip(values: Sequence[float]) -> float:
    """p of mean 0, two-sided: all 2^n ways to flip the signs of n independent values.

    With n = 10 stories the smallest p is 2 / 1024.

    Raises:
        ValueError: more than 20 values, which would be too many ways.
    """
    x = np.asarray(values, dtype=float)
    if len(x) > 20:
        raise ValueError(f"{len(x)} values have 2^{len(x)} sign flips: at most 20 are enumerated")
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(x))))
    sums = np.abs(signs @ x)
    return float(np.mean(sums >= abs(x.sum()) - 1e-12 * max(np.abs(x).sum(), 1e-300)))
