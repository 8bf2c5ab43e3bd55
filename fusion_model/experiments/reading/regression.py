"""How well surprisal predicts reading times: Pearson's r, and the ΔLL of a regression.

The regression is linear, on the mean time of each word in ms. Base predictors: length and log
frequency of the word and of the SPILLOVER words before it; the full model adds the surprisal of
all these words. ΔLL is the log-likelihood of held-out stories under the full model minus that
under the base model, in nats a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fusion_model.errors import FusionLMError
from fusion_model.experiments.reading.data import Frequencies, ReadingTimes
from fusion_model.experiments.statistics import Estimate, bootstrap_groups, sign_flip

SPILLOVER = 2
FOLDS = 10


@dataclass(frozen=True)
class Predictors:
    """What the regressions are made of, for words that have a time and a full history.

    Attributes:
        rows: places in the corpus, int [N].
        stories: [N].
        times: ms, [N].
        base: [N, 2 * (1 + SPILLOVER)]: length and log frequency, the word's own first.
    """

    rows: np.ndarray
    stories: np.ndarray
    times: np.ndarray
    base: np.ndarray

    def surprisal(self, values: np.ndarray) -> np.ndarray:
        """Surprisal of the words and of those before, [N, 1 + SPILLOVER], from all words' [M]."""
        return _history(values, self.rows)


def predictors(corpus: ReadingTimes, alignment: str, frequencies: Frequencies) -> Predictors:
    """Base predictors of a corpus under an alignment; words early in a story drop out."""
    times, stories = corpus.aligned(alignment), corpus.stories
    usable = np.isfinite(times)
    usable[:SPILLOVER] = False
    usable[SPILLOVER:] &= stories[SPILLOVER:] == stories[:-SPILLOVER]
    rows = np.flatnonzero(usable)
    if len(np.unique(stories[rows])) < 2:
        raise FusionLMError(f"{corpus.name} has one story only: cross-validation needs several")
    length = np.array([len(word) for word in corpus.words], dtype=float)
    frequency = np.array([frequencies.log(word) for word in corpus.words])
    base = np.concatenate([_history(length, rows), _history(frequency, rows)], axis=1)
    return Predictors(rows, stories[rows], times[rows], base)


def _history(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return np.stack([values[rows - back] for back in range(SPILLOVER + 1)], axis=1)


def held_out_log_likelihood(x: np.ndarray, y: np.ndarray, stories: np.ndarray) -> np.ndarray:
    """log p of each y [N] under a Gaussian regression on x [N, K] fitted without its story.

    With up to FOLDS stories each is a fold of its own, else stories are dealt out to the folds.
    """
    fold = np.unique(stories, return_inverse=True)[1] % FOLDS
    design = np.column_stack([np.ones(len(y)), x])
    result = np.empty(len(y))
    for held_out in np.unique(fold):
        test = fold == held_out
        weights = np.linalg.lstsq(design[~test], y[~test], rcond=None)[0]
        variance = np.mean((y[~test] - design[~test] @ weights) ** 2)
        error = y[test] - design[test] @ weights
        result[test] = -0.5 * (np.log(2 * np.pi * variance) + error**2 / variance)
    return result


@dataclass(frozen=True)
class Fit:
    """One model in one setting; `versus` compares it with the reference model: ours - theirs.

    Attributes:
        r: Pearson's, surprisal with time.
        delta: ΔLL over the base regression, nats a word.
        r_versus, delta_versus: differences; None for the reference itself.
    """

    r: Estimate
    delta: Estimate
    r_versus: Estimate | None
    delta_versus: Estimate | None


def compare(
    data: Predictors, surprisals: Mapping[str, np.ndarray], reference: str
) -> dict[str, Fit]:
    """All models against `reference`; intervals from resampled stories, p by sign flips.

    Args:
        surprisals: of all words of the corpus, by model, each [M].
    """
    names = list(surprisals)
    base = held_out_log_likelihood(data.base, data.times, data.stories)
    own = np.stack([surprisals[n][data.rows] for n in names], axis=1)
    gains = np.stack(
        [
            held_out_log_likelihood(
                np.column_stack([data.base, data.surprisal(surprisals[n])]),
                data.times,
                data.stories,
            )
            - base
            for n in names
        ],
        axis=1,
    )
    at = names.index(reference)

    def statistic(rows: np.ndarray) -> np.ndarray:
        r, gain = _correlations(own[rows], data.times[rows]), gains[rows].mean(axis=0)
        return np.concatenate([r, r - r[at], gain, gain - gain[at]])

    everything = np.arange(len(data.times))
    values = statistic(everything)
    low, high = bootstrap_groups(statistic, data.stories)
    parts = [everything[data.stories == s] for s in np.unique(data.stories)]
    by_story = np.stack([statistic(rows) for rows in parts])
    estimates = [
        Estimate(float(v), float(a), float(b), _p(by_story[:, i]))
        for i, (v, a, b) in enumerate(zip(values, low, high, strict=True))
    ]
    k = len(names)
    return {
        name: Fit(
            estimates[i],
            estimates[2 * k + i],
            None if i == at else estimates[k + i],
            None if i == at else estimates[3 * k + i],
        )
        for i, name in enumerate(names)
    }


def _correlations(columns: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = columns - columns.mean(axis=0)
    y = y - y.mean()
    return (x * y[:, None]).sum(axis=0) / np.sqrt((x**2).sum(axis=0) * (y**2).sum())


def _p(by_story: np.ndarray) -> float:
    if len(by_story) <= 20:
        return sign_flip(by_story.tolist())
    from scipy import stats

    return float(stats.ttest_1samp(by_story, 0.0).pvalue)
