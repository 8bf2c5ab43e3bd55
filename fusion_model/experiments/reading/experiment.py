"""Experiment `reading-times`: do fused models predict human reading times better?

The question is asked at equal perplexity, since ΔLL changes with it. One setting answers it: times
corrected where they were stored early, each sentence on its own, in ms; others are told beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from fusion_model.data.text import Document
from fusion_model.errors import FusionLMError
from fusion_model.experiments.figures import curves
from fusion_model.experiments.reading.data import Frequencies, ReadingTimes
from fusion_model.experiments.reading.regression import (
    Measured,
    Model,
    at_equal_perplexity,
    measure,
    predictors,
)
from fusion_model.experiments.report import Findings, interval
from fusion_model.experiments.statistics import Estimate, estimate, verdict

MILLI = 1000
MARGIN = 0.2
WORDS = {
    "better": "better than {}",
    "worse": "worse than {}",
    "equivalent": "no gain: within ±20 % of {}",
    "undecided": "undecided: neither a difference from {} nor its absence is shown",
}


def run(
    corpus: ReadingTimes,
    surprisals: Mapping[Model, np.ndarray],
    frequency_text: Mapping[str, Sequence[Document]],
    models_note: str,
) -> Findings:
    """Every arm against the first.

    Args:
        surprisals: bits of every word with each seed, [S, M], by arm and training text.
        frequency_text: corpora whose words are counted, the training text of the models.
        models_note: what the models are, for the report.

    Raises:
        FusionLMError: no text to count words in.
    """
    counted = [d for documents in frequency_text.values() for d in documents]
    if not counted:
        raise FusionLMError("reading-times counts word frequencies in --data: give it text, too")
    if len({arm for arm, _ in surprisals}) < 2:
        raise FusionLMError("reading-times compares models: it needs two arms at least")
    frequencies = Frequencies(counted)
    findings = Findings("reading-times", "Reading times", "")
    rows = []
    for primary, alignment, log in [
        (alignment == corpus.alignments[-1] and not log, alignment, log)
        for alignment in reversed(corpus.alignments)
        for log in (False, True)
    ]:
        data = predictors(corpus, alignment, frequencies, log)
        found = measure(data, surprisals)
        rows += _compared(findings, found, f"{alignment}{', log' * log}", primary)
        if primary:
            words = len(data.times)
            r = float(np.corrcoef(data.base[:, 0], data.times)[0, 1])
            _describe_models(findings, found, r)
    findings.setting = (
        f"{corpus.name}: {len(corpus.words):,} words in {len(np.unique(corpus.stories))} stories, "
        f"{words:,} of them in the regressions, which are of mean times: the data has none of "
        f"single readers. {models_note} Log frequency from {frequencies.tokens:,} words of "
        f"{', '.join(frequency_text)}. Intervals: stories, and seeds where there are "
        "several, drawn anew, n − 1 of n, 4 000 times."
    )
    findings.table(
        "equal-perplexity",
        "ΔLL of each arm minus that of the first, in 10⁻³ nats a word with its 95 % interval: as it"
        " is, the mean over sizes, and at equal perplexity, the distance of parallel lines through "
        "all sizes (with one size, as it is). That also in percent of the first's, which is drawn "
        "with it, with its 90 % interval; the verdict is of two one-sided tests at 5 %.",
        ["times", "arm", "ΔΔLL", "at equal perplexity", "% of the first's ΔLL", "so it is"],
        rows,
        left=2,
    )
    return findings


def _compared(
    findings: Findings, found: Mapping[Model, Measured], times: str, primary: bool
) -> list[list[str]]:
    """Rows of the table, one an arm; the primary setting is the answer, too."""
    arms: dict[str, list[Measured]] = {}
    for (arm, _), measured in found.items():
        arms.setdefault(arm, []).append(measured)
    (reference, base), *others = arms.items()
    level = np.abs(np.mean([m.delta for m in base], axis=0))
    rows = []
    for arm, models in others:
        same = [size for a, size in found if a == arm and (reference, size) in found]
        if not same:
            continue
        difference = at_equal_perplexity(base, models)
        plain = [found[arm, size].delta - found[reference, size].delta for size in same]
        percent = estimate(100 * difference / level, 0.9)
        judged = verdict(difference, MARGIN * level)
        raw, shown = (
            interval(estimate(MILLI * d), 1, True) for d in (np.mean(plain, axis=0), difference)
        )
        rows.append([times, arm, raw, shown, interval(percent, 0, True), judged])
        findings.data.setdefault("verdicts", {}).setdefault(times, {})[arm] = judged
        if primary:
            findings.answer.append(
                f"**{arm}: {WORDS[judged].format(reference)}** at equal perplexity: ΔLL {shown} "
                f"·10⁻³ nats a word, {interval(percent, 0, True)} % of {reference}'s (90 %)."
            )
    return rows


def _describe_models(findings: Findings, found: Mapping[Model, Measured], length: float) -> None:
    """ΔLL against perplexity, a row a model and a line an arm.

    Args:
        length: r of word length and reading time.
    """
    rows = []
    lines: dict[str, list[tuple[float, Estimate]]] = {}
    for (arm, size), m in found.items():
        delta = estimate(MILLI * m.delta)
        bits, r = estimate(m.bits), estimate(m.r)
        perplexity = f"{2**bits.value:,.0f}"
        rows.append([arm, size, perplexity, interval(r), interval(delta, 1)])
        lines.setdefault(arm, []).append((bits.value, delta))
        findings.data.setdefault("models", []).append(
            {"arm": arm, "size": size, "bits": asdict(bits), "r": asdict(r), "delta": asdict(delta)}
        )
    findings.table(
        "models",
        "Each model: perplexity a word on this text, Pearson's r of surprisal and reading time, "
        "and ΔLL over length, log frequency and both of the two words before, in 10⁻³ nats a word, "
        f"on held-out stories. r does not measure how good a model is: length has {length:.2f}.",
        ["arm", "trained on", "perplexity a word", "r", "ΔLL"],
        rows,
        left=2,
    )
    findings.figures["delta-ll"] = curves(
        lines, "mean surprisal of a word (bits)", "ΔLL (10⁻³ nats a word)"
    )
