"""How well surprisal predicts reading times: Pearson's r, and the ΔLL of a regression.

The regression is linear, on the mean time of each word, in ms or its logarithm. Base predictors:
length and log frequency of the word and of the SPILLOVER words before it; the full model adds the
surprisal of all these words. ΔLL is the log-likelihood of held-out stories under the full model
minus that under the base model, in nats a word.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fusion_model.errors import FusionLMError
from fusion_model.experiments.reading.data import Frequencies, ReadingTimes
from fusion_model.experiments.statistics import resampled_means

SPILLOVER = 2
FOLDS = 10
Model = tuple[str, str]
"""Arm, and what it was trained on."""


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


def predictors(
    corpus: ReadingTimes, alignment: str, frequencies: Frequencies, log: bool = False
) -> Predictors:
    """Base predictors of a corpus under an alignment; words early in a story drop out.

    Args:
        log: times are logarithms.
    """
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
    own = times[rows]
    return Predictors(rows, stories[rows], np.log(own) if log else own, base)


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


class Measured(NamedTuple):
    """One model, each [1 + RESAMPLES], as measured and with other stories and seeds.

    Attributes:
        bits: mean surprisal of a word: log2 of its perplexity on this text.
        r: Pearson's, surprisal with time, the mean over seeds.
        delta: ΔLL over the base regression, nats a word.
    """

    bits: np.ndarray
    r: np.ndarray
    delta: np.ndarray


def measure(data: Predictors, surprisals: Mapping[Model, np.ndarray]) -> dict[Model, Measured]:
    """All models, stories drawn alike for all.

    Args:
        surprisals: of all words of the corpus with each seed, [S, M], by model.
    """
    _, story = np.unique(data.stories, return_inverse=True)
    words = np.bincount(story).astype(float)
    base = held_out_log_likelihood(data.base, data.times, data.stories)
    own, gains = {}, {}
    for model, seeds in surprisals.items():
        full = [np.column_stack([data.base, data.surprisal(values)]) for values in seeds]
        found = [held_out_log_likelihood(x, data.times, data.stories) - base for x in full]
        gains[model] = np.stack([np.bincount(story, gain) for gain in found])
        own[model] = np.stack([values[data.rows] for values in seeds])
    sums = {m: np.stack([np.bincount(story, x) for x in values]) for m, values in own.items()}
    bits, deltas = resampled_means(sums, words), resampled_means(gains, words)
    y = data.times - data.times.mean()
    correlations = {}
    for model, values in own.items():
        x = values - values.mean(axis=1, keepdims=True)
        products = (x, np.broadcast_to(y, x.shape), x * y, x**2, np.broadcast_to(y**2, x.shape))
        # Means of each product over the same drawn stories make a correlation for each seed.
        by_seed = [
            [resampled_means({"": np.bincount(story, p[s])[None]}, words)[""] for p in products]
            for s in range(len(x))
        ]
        correlations[model] = np.mean(
            [(xy - a * b) / np.sqrt((xx - a**2) * (yy - b**2)) for a, b, xy, xx, yy in by_seed],
            axis=0,
        )
    return {m: Measured(bits[m], correlations[m], deltas[m]) for m in own}


def at_equal_perplexity(reference: Sequence[Measured], ours: Sequence[Measured]) -> np.ndarray:
    """How much higher ΔLL is than the reference's at equal perplexity, [1 + RESAMPLES]: the
    distance of two parallel lines, ΔLL against mean surprisal, through models of several sizes.
    With one size the line would be a point: the difference as it is."""
    if len(reference) < 2:
        difference: np.ndarray = ours[0].delta - reference[0].delta
        return difference
    models = [*reference, *ours]
    bits, delta = (np.stack([getattr(m, n) for m in models], axis=1) for n in ("bits", "delta"))
    is_ours = np.repeat([0.0, 1.0], [len(reference), len(ours)])
    x = np.stack([np.ones_like(bits), bits, np.broadcast_to(is_ours, bits.shape)], axis=2)
    return np.asarray((np.linalg.pinv(x) @ delta[..., None])[:, 2, 0])
