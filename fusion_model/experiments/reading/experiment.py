"""Experiment `reading-times`: do fused models predict human reading times better?

The question is asked at equal perplexity: a better language model predicts reading times better
by that alone. One setting answers it: times corrected where they were stored early, each sentence
on its own, in ms; others are told beside it.
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
            _describe_models(findings, found)
    findings.setting = (
        f"{corpus.name}: {len(corpus.words):,} words in {len(np.unique(corpus.stories))} stories, "
        f"{words:,} of them in the regressions, which are of mean times: the data has none of "
        f"single readers. {models_note} Log frequency from {frequencies.tokens:,} words of "
        f"{', '.join(frequency_text)}. Intervals: stories and seeds drawn anew, n − 1 of n, "
        "4 000 times."
    )
    findings.table(
        "equal-perplexity",
        "ΔLL of each arm minus that of the first, at equal perplexity: the distance of parallel "
        "lines through all sizes (with one size, as it is), in 10⁻³ nats a word with its 95 % "
        "interval, and in percent of the first's with the 90 % interval of two one-sided tests.",
        ["times", "arm", "ΔΔLL", "% of the first's ΔLL", "so it is"],
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
    level = float(np.mean([m.delta[0] for m in base]))
    rows = []
    for arm, models in others:
        same = [at for at, (a, size) in enumerate(found) if a == arm and (reference, size) in found]
        if not same:
            continue
        difference = at_equal_perplexity(base, models)
        percent = estimate(100 * difference / abs(level), 0.9)
        judged = verdict(difference, MARGIN * abs(level))
        shown = interval(estimate(MILLI * difference), 1, True)
        rows.append([times, arm, shown, interval(percent, 0, True), judged])
        findings.data.setdefault("verdicts", {}).setdefault(times, {})[arm] = judged
        if primary:
            findings.answer.append(
                f"**{arm}: {WORDS[judged].format(reference)}** at equal perplexity: ΔLL {shown} "
                f"·10⁻³ nats a word, {interval(percent, 0, True)} % of {reference}'s (90 %)."
            )
    return rows


def _describe_models(findings: Findings, found: Mapping[Model, Measured]) -> None:
    """ΔLL against perplexity, a row a model and a line an arm."""
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
        "on held-out stories. r does not measure how good a model is: word length alone has 0.32.",
        ["arm", "trained on", "perplexity a word", "r", "ΔLL"],
        rows,
        left=2,
    )
    findings.figures["delta-ll"] = curves(
        lines, "mean surprisal of a word (bits)", "ΔLL (10⁻³ nats a word)"
    )
