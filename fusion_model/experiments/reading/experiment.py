"""Experiment `reading-times`: do fused models predict human reading times better?"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fusion_model import progress
from fusion_model.data.text import Document
from fusion_model.errors import FusionLMError
from fusion_model.experiments.figures import intervals
from fusion_model.experiments.reading.data import Frequencies, ReadingTimes
from fusion_model.experiments.reading.regression import Fit, compare, predictors
from fusion_model.experiments.report import Findings, interval, p_value, plain_number, signed
from fusion_model.experiments.statistics import Estimate, holm
from fusion_model.files import replacing
from fusion_model.language_model import FusionLM
from fusion_model.surprisal import CONTEXTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    """Surprisal in bits of every word of the documents, sentence ends left out, [M].

    Args:
        store: folder for stores of embeddings, one an encoder.
    """
    if store is not None and lm.planner is not None:
        encoder = lm.planner.encoder
        kind = f"{encoder.fingerprint} {lm.planner.view} {encoder.policy}"
        store = store / f"store-{hashlib.sha256(kind.encode()).hexdigest()[:10]}"
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
                for lm in seeds:
                    done += 1
                    tail = "-corrected" if correction else ""
                    path = cache / f"surprisal-{_digest(lm, documents)}-{context}{tail}.npy"
                    if not path.exists():
                        progress.note(f"surprisal {done} of {total}: {name}, {context} context")
                        bits = word_surprisal(lm, documents, context, correction, cache)
                        with replacing(path) as temporary:
                            np.save(temporary, bits)
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
    setting = (
        f"{corpus.name}: {len(corpus.words):,} words in {len(np.unique(corpus.stories))} stories, "
        f"{words:,} of them in the regressions. {models_note} Log frequency from "
        f"{frequencies.tokens:,} words of {', '.join(frequency_text)}. Intervals: 95 %, stories "
        "resampled 2 000 times. p: sign flips of the stories, two-sided, not adjusted for the "
        "number of settings unless it says so. A difference counts as shown where the interval "
        "leaves out 0 and p is below 0.05."
    )
    findings = Findings("reading-times", "Reading times", setting, models_note)
    others = [name for name in next(iter(fits.values())) if name != reference]
    findings.answer = [_count(fits, name, reference) for name in others]
    findings.answer += [_answer(corpus, fits, name, reference) for name in others]
    _add_tables(findings, fits, reference)
    plain = surprisals["sentence", False]
    unit = "10⁻³ nats a word"
    findings.figures = {
        "correlations": _figure(
            fits, lambda fit: fit.r, "Pearson's r of surprisal and reading time"
        ),
        "differences": _figure(
            fits,
            lambda fit: _scaled(fit.delta_versus),
            f"ΔLL − that of {reference} ({unit})",
            zero=True,
            leave_out=reference,
        ),
        "delta-ll": _figure(
            fits, lambda fit: _scaled(fit.delta), f"ΔLL on held-out stories ({unit})", zero=True
        ),
    }
    findings.data = {
        "reference": reference,
        "fits": [
            {
                "alignment": a,
                "context": c,
                "whitespace_correction": w,
                "models": {name: asdict(fit) for name, fit in found.items()},
            }
            for (a, c, w), found in fits.items()
        ],
        "bits_per_word": {name: float(v.mean()) for name, v in plain.items()},
    }
    return findings


def _add_tables(
    findings: Findings, fits: Mapping[Setting, Mapping[str, Fit]], reference: str
) -> None:
    where = ("times", "context", "spaces", "model")
    models, differences = [], []
    for (alignment, context, correction), found in fits.items():
        spaces = "corrected" if correction else "plain"
        for name, fit in found.items():
            row = [ALIGNMENT_NAMES[alignment], context, spaces, name]
            delta = interval(_scaled(fit.delta), 1)
            models.append([*row, interval(fit.r), delta, p_value(fit.delta.p)])
            if fit.r_versus is None:
                continue
            versus = _scaled(fit.delta_versus)
            r = [interval(fit.r_versus, 3, sign=True), p_value(fit.r_versus.p)]
            differences.append([*row, *r, interval(versus, 1, sign=True), p_value(versus.p)])
    findings.table(
        "models",
        "Each model: Pearson's r of surprisal and reading time; ΔLL over length, log frequency and "
        "both of the two words before, in 10⁻³ nats a word, held-out stories.",
        [*where, "r", "ΔLL", "p of ΔLL"],
        models,
        left=4,
    )
    findings.table(
        "differences",
        f"Each model minus {reference}: of r, and of ΔLL in 10⁻³ nats a word.",
        [*where, "Δr", "p", "ΔΔLL", "p"],
        differences,
        left=4,
    )


def _scaled(estimate: Estimate | None) -> Estimate:
    assert estimate is not None
    return estimate.scaled(MILLI)


def _figure(
    fits: Mapping[Setting, Mapping[str, Fit]],
    pick: Callable[[Fit], Estimate],
    xlabel: str,
    zero: bool = False,
    leave_out: str = "",
) -> "Figure":
    """A panel an alignment, a row a setting, a series a model."""
    names = [n for n in next(iter(fits.values())) if n != leave_out]
    panels: dict[str, dict[str, list[Estimate]]] = {}
    for (alignment, context, correction), models in fits.items():
        label = f"{context} context{', spaces corrected' if correction else ''}"
        rows = panels.setdefault(f"times {ALIGNMENT_NAMES[alignment]}", {})
        rows[label] = [pick(models[name]) for name in names]
    return intervals(panels, xlabel, names, zero, first=1 if leave_out else 0)


def _count(fits: Mapping[Setting, Mapping[str, Fit]], name: str, reference: str) -> str:
    """The null result of the paper over all settings, in two sentences."""
    measured = {
        "r": [fit[name].r_versus for fit in fits.values()],
        "ΔLL": [fit[name].delta_versus for fit in fits.values()],
    }
    parts, null = [], True
    for what, estimates in measured.items():
        plain = [_verdict(e) for e in estimates]
        adjusted = [_verdict(e) for e in _adjusted(estimates)]
        null = null and "better" not in adjusted
        parts.append(
            f"{what} is better in {plain.count('better')} and worse in {plain.count('worse')} "
            f"(p adjusted by Holm: {adjusted.count('better')} and {adjusted.count('worse')})"
        )
    outcome = "the paper's null result " + (
        "stands: no gain is shown, which is not to say that there is none"
        if null
        else "does not stand"
    )
    deltas = [_scaled(fit[name].delta_versus) for fit in fits.values()]
    values = [e.value for e in deltas]
    return (
        f"**{name}: {outcome}.** Of {len(fits)} settings, against {reference}: {'; '.join(parts)}. "
        f"The differences of ΔLL lie between {signed(min(values), 1)} and {signed(max(values), 1)} "
        f"·10⁻³ nats a word, their intervals between {signed(min(e.low for e in deltas), 1)} and "
        f"{signed(max(e.high for e in deltas), 1)}."
    )


def _adjusted(estimates: Sequence[Estimate | None]) -> list[Estimate | None]:
    """With p adjusted for the number of settings."""
    found = [e for e in estimates if e is not None]
    adjusted = holm([1.0 if e.p is None else e.p for e in found])
    return [replace(e, p=p) for e, p in zip(found, adjusted, strict=True)]


def _answer(
    corpus: ReadingTimes,
    fits: Mapping[Setting, Mapping[str, Fit]],
    name: str,
    reference: str,
) -> str:
    """One paragraph a model: sentence context, no correction of spaces, each alignment."""
    parts = []
    for alignment in corpus.alignments:
        fit = fits[alignment, "sentence", False]
        ours, theirs = fit[name], fit[reference]
        r, d = ours.r_versus, _scaled(ours.delta_versus)
        assert r is not None
        parts.append(
            f"With the times {ALIGNMENT_NAMES[alignment]}, r is {plain_number(ours.r.value)} "
            f"against {plain_number(theirs.r.value)}, a difference of {interval(r, 3, True)}, "
            f"p {p_value(r.p)} ({_verdict(r)}); "
            f"ΔLL is {plain_number(ours.delta.value * MILLI, 1)} against "
            f"{plain_number(theirs.delta.value * MILLI, 1)} ·10⁻³ nats a word, a difference of "
            f"{interval(d, 1, True)}, p {p_value(d.p)} ({_verdict(d)})."
        )
    return f"**{name} against {reference}.** " + " ".join(parts)


def _verdict(estimate: Estimate | None) -> str:
    """Shown only where interval and test agree: with ten stories either alone is bold."""
    assert estimate is not None
    if estimate.p is None or estimate.p >= 0.05 or estimate.low <= 0 <= estimate.high:
        return "no difference shown"
    return "better" if estimate.value > 0 else "worse"


def _digest(lm: FusionLM, documents: Sequence[Document]) -> str:
    """Names the model's weights and the text, so that a cache never serves another's values."""
    digest = hashlib.sha256(repr([d.sentences for d in documents]).encode())
    for tensor in lm.model.state_dict().values():
        digest.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
