"""Experiment `reading-times`: do fused models predict human reading times better?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from fusion_model import progress
from fusion_model.errors import FusionLMError
from fusion_model.experiments.figures import intervals
from fusion_model.experiments.reading import Fit, compare, predictors
from fusion_model.experiments.reading_data import Frequencies, ReadingTimes
from fusion_model.experiments.report import Findings, Table, interval, p_value, plain_number
from fusion_model.experiments.statistics import Estimate
from fusion_model.language_model import FusionLM
from fusion_model.text import Document
from fusion_model.words import CONTEXTS

MILLI = 1000
ALIGNMENT_NAMES = {"stored": "as stored", "corrected": "corrected"}
Setting = tuple[str, str, bool]
"""Alignment, context, whitespace correction."""


def word_surprisal(
    lm: FusionLM,
    documents: Sequence[Document],
    context: str,
    correction: bool,
    store: Path | None = None,
) -> np.ndarray:
    """Surprisal in bits of every word of the documents, sentence ends left out, [M]."""
    with lm.open_store(store) as vectors:
        scores = lm.score(
            documents, context=context, whitespace_correction=correction, store=vectors
        )
    lengths = {
        (d.name, i): len(s.split()) for d in documents for i, s in enumerate(d.sentences, start=1)
    }
    return np.array([w.bits for w in scores if w.word <= lengths[w.document, w.sentence]])


def surprisals_of(
    models: Mapping[str, Sequence[FusionLM]], documents: Sequence[Document], cache: Path
) -> dict[tuple[str, bool], dict[str, np.ndarray]]:
    """Word surprisals by (context, correction) and model, the mean over a model's seeds."""
    cache.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, bool], dict[str, np.ndarray]] = {}
    total = 4 * sum(map(len, models.values()))
    done = 0
    for name, seeds in models.items():
        for context in CONTEXTS:
            for correction in (False, True):
                values = []
                for seed, lm in enumerate(seeds):
                    done += 1
                    tail = "-corrected" if correction else ""
                    path = cache / f"surprisal-{_file(name)}-{seed}-{context}{tail}.npy"
                    if not path.exists():
                        progress.note(f"surprisal {done} of {total}: {name}, {context} context")
                        store = cache / f"store-{_file(name)}-{seed}"
                        bits = word_surprisal(lm, documents, context, correction, store)
                        with open(path.with_suffix(".tmp"), "wb") as file:
                            np.save(file, bits)
                        path.with_suffix(".tmp").replace(path)
                    values.append(np.load(path))
                found.setdefault((context, correction), {})[name] = np.mean(values, axis=0)
    return found


def run(
    corpus: ReadingTimes,
    models: Mapping[str, Sequence[FusionLM]],
    reference: str,
    frequency_text: Mapping[str, Sequence[Document]],
    cache: Path,
    models_note: str,
) -> Findings:
    """Every model in every setting, against `reference`.

    Args:
        frequency_text: corpora whose words are counted, the training text of the models.
        cache: folder for surprisals and embeddings; a run goes on from there.
        models_note: what the models are, for the report.

    Raises:
        FusionLMError: no text to count words in.
    """
    counted = [d for documents in frequency_text.values() for d in documents]
    if not counted:
        raise FusionLMError("reading-times counts word frequencies in --data: give it text, too")
    frequencies = Frequencies(counted)
    surprisals = surprisals_of(models, corpus.documents(), cache)
    fits: dict[Setting, dict[str, Fit]] = {}
    words = 0
    for alignment in corpus.alignments:
        data = predictors(corpus, alignment, frequencies)
        words = len(data.times)
        for (context, correction), values in surprisals.items():
            progress.note(f"regressions: times {alignment}, {context}, correction {correction}")
            fits[alignment, context, correction] = compare(data, values, reference)
    return _findings(
        corpus, fits, surprisals, reference, words, models_note, frequencies, frequency_text
    )


def _findings(
    corpus: ReadingTimes,
    fits: dict[Setting, dict[str, Fit]],
    surprisals: dict[tuple[str, bool], dict[str, np.ndarray]],
    reference: str,
    words: int,
    models_note: str,
    frequencies: Frequencies,
    frequency_text: Mapping[str, Sequence[Document]],
) -> Findings:
    counted = f"{frequencies.tokens:,} words of {', '.join(frequency_text)}"
    setting = (
        f"{corpus.name}: {len(corpus.words):,} words in {len(np.unique(corpus.stories))} stories, "
        f"{words:,} of them in the regressions. {models_note} Log frequency from {counted}. "
        "Intervals: 95 %, stories resampled 2 000 times. p: sign flips of the stories, two-sided."
    )
    findings = Findings("reading-times", "Reading times", setting)
    others = [name for name in next(iter(fits.values())) if name != reference]
    findings.answer = [_answer(corpus, fits, name, reference) for name in others]
    mean = {n: float(v.mean()) for n, v in surprisals["sentence", False].items()}
    rows = [
        [
            *_setting_names(key),
            name,
            interval(fit.r),
            interval(_scaled(fit.delta), 1),
            p_value(fit.delta.p),
        ]
        for key, models in fits.items()
        for name, fit in models.items()
    ]
    where = ("times", "context", "spaces", "model")
    findings.tables = [
        Table(
            "models",
            "Each model: Pearson's r of surprisal and reading time; ΔLL over length, log "
            "frequency and both of the two words before, in 10⁻³ nats a word, held-out stories. "
            + models_note,
            [*where, "r", "ΔLL", "p of ΔLL"],
            rows,
            left=4,
        ),
        Table(
            "differences",
            f"Each model minus {reference}: of r, and of ΔLL in 10⁻³ nats a word. " + models_note,
            [*where, "Δr", "p", "ΔΔLL", "p"],
            [
                [
                    *_setting_names(key),
                    name,
                    interval(fit.r_versus, 3, sign=True),
                    p_value(fit.r_versus.p),
                    interval(_scaled(fit.delta_versus), 1, sign=True),
                    p_value(fit.delta_versus.p),
                ]
                for key, models in fits.items()
                for name, fit in models.items()
                if fit.r_versus is not None and fit.delta_versus is not None
            ],
            left=4,
        ),
    ]
    findings.figures = {
        "correlations": _figure(
            fits, lambda fit: fit.r, "Pearson's r of surprisal and reading time"
        ),
        "delta-ll": _figure(
            fits, lambda fit: _scaled(fit.delta), "ΔLL on held-out stories (10⁻³ nats a word)", True
        ),
    }
    findings.data = {
        "reference": reference,
        "bits_per_word": mean,
        "fits": [
            {
                "alignment": a,
                "context": c,
                "whitespace_correction": w,
                "models": {name: asdict(fit) for name, fit in models.items()},
            }
            for (a, c, w), models in fits.items()
        ],
    }
    return findings


def _setting_names(key: Setting) -> tuple[str, str, str]:
    alignment, context, correction = key
    return ALIGNMENT_NAMES[alignment], context, "corrected" if correction else "plain"


def _scaled(estimate: Estimate | None) -> Estimate:
    assert estimate is not None
    e = estimate
    return Estimate(e.value * MILLI, e.low * MILLI, e.high * MILLI, e.p)


def _figure(fits, pick, xlabel, zero=False):  # type: ignore[no-untyped-def]
    alignments = list(dict.fromkeys(a for a, _, _ in fits))
    names = list(next(iter(fits.values())))
    panels = {}
    for alignment in alignments:
        rows = {}
        for (a, context, correction), models in fits.items():
            if a == alignment:
                label = f"{context}{', spaces corrected' if correction else ''}"
                rows[label] = [pick(models[name]) for name in names]
        panels[f"times {ALIGNMENT_NAMES[alignment]}"] = rows
    return intervals(panels, xlabel, names, zero)


def _answer(corpus, fits, name, reference):  # type: ignore[no-untyped-def]
    """One paragraph a model: sentence context, no correction of spaces, each alignment."""
    parts = []
    for alignment in corpus.alignments:
        fit = fits[alignment, "sentence", False]
        ours, theirs = fit[name], fit[reference]
        r, d = ours.r_versus, _scaled(ours.delta_versus)
        parts.append(
            f"With the times {ALIGNMENT_NAMES[alignment]}, r is {plain_number(ours.r.value)} "
            f"against {plain_number(theirs.r.value)}, a difference of {interval(r, 3, True)} "
            f"({_verdict(r)}); ΔLL is {plain_number(ours.delta.value * MILLI, 1)} against "
            f"{plain_number(theirs.delta.value * MILLI, 1)} ·10⁻³ nats a word, a difference of "
            f"{interval(d, 1, True)}, p {p_value(d.p)} ({_verdict(d)})."
        )
    return f"**{name} against {reference}.** " + " ".join(parts)


def _verdict(estimate: Estimate) -> str:
    if estimate.low > 0:
        return "better"
    return "worse" if estimate.high < 0 else "no difference shown"


def _file(name: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "-" for c in name)
