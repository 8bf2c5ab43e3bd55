"""The experiments that train arms and compare their losses: all but `reading-times`, `examples`."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fusion_model.config import EARLY, LATE
from fusion_model.experiments.arms import COUNTED, STATIC, UNFUSED, Arm
from fusion_model.experiments.figures import curves, intervals
from fusion_model.experiments.report import Findings, interval
from fusion_model.experiments.statistics import Estimate, estimate
from fusion_model.experiments.study import Study
from fusion_model.experiments.tables import (
    Losses,
    Results,
    add_perplexities,
    answers,
    best_epoch,
    compared_with,
    describe,
    differences,
    grid_edges,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "fusion": "Ways to fuse",
    "data-size": "Less training data",
    "domain": "Other domains",
    "encoder": "Encoders and poolings",
    "view": "What the encoder sees",
    "schedule": "Dropout on the embedding, rising and falling",
    "policy": "How often the encoder runs",
}
# What the arms of an experiment vary, at its usual value.
COMPARED = {"view": "prefix", "schedule": "constant dropout", "policy": "every"}


def run(name: str, studies: Mapping[int, Study], arms: Sequence[Arm], note: str) -> Findings:
    """Train, compare and report one of `TITLES`; the arms are those of `arms_of`.

    Args:
        studies: by number of training sentences; several for `data-size`.
        note: on the encoder, for every table.
    """
    found = {n: s.results(arms) for n, s in studies.items()}
    trained = [n for n, results in found.items() if results] or list(studies)
    study, results = list(studies.values())[-1], list(found.values())[-1]
    findings = Findings(name, TITLES[name], describe(study, note, trained), note)
    findings.notes = [
        f"{n:,} sentences: {line}" for n in trained for line in grid_edges(studies[n], found[n])
    ]
    tests = study.texts.tests
    if name == "data-size":
        groups = {f"{n:,}": (r, tests["test"]) for n, r in found.items() if r}
        losses = add_perplexities(findings, groups, "sentences")
        for label, those in losses.items():
            findings.answer += answers(those, f"{label} sentences{_seeds(groups[label][0])}: ")
        _add_trend(findings, {n: losses[f"{n:,}"] for n, r in found.items() if r})
        return findings
    if name == "domain":
        domains = {test: (results, path) for test, path in tests.items()}
        for test, those in add_perplexities(findings, domains, "tested on").items():
            where = "same domain" if test == "test" else test
            findings.answer += answers(those, f"{where}{_seeds(results)}: ")
        return findings
    (own,) = add_perplexities(findings, {"": (results, tests["test"])}).values()
    findings.answer = answers(own)
    if name in COMPARED:
        varied = [a.name for a in arms if a not in COUNTED and a.options.get("fusion") == "concat"]
        findings.answer += compared_with(own, COMPARED[name], varied)
    if name == "fusion":
        findings.answer += _early_and_late(results)
    if name == "encoder":
        cosines = {n: runs[0].result.get("cosine") for n, runs in results.items()}
        shown = "; ".join(f"{n} {value:.3f}" for n, value in cosines.items() if value is not None)
        findings.answer.append(f"Mean cosine of e at successive positions on test: {shown}.")
    if name == "schedule":
        findings.answer += _weaned(results)
    findings.figures["dev-perplexity"] = _learning_curves(results)
    findings.figures["test-differences"] = _gains(own)
    return findings


def _seeds(results: Results) -> str:
    return " (one seed)" if max(map(len, results.values())) == 1 else ""


def _early_and_late(results: Results) -> list[str]:
    """Whether early fusion is done sooner, as the paper has it."""
    parts = []
    for family, modes in (("late", LATE), ("early", EARLY)):
        epochs = [best_epoch(results[mode]) for mode in modes if mode in results]
        if epochs:
            parts.append(f"{np.mean(epochs):.1f} for {family} fusion ({', '.join(modes)})")
    return [f"Best epoch on dev, the mean over modes and seeds: {', '.join(parts)}."]


def _weaned(results: Results) -> list[str]:
    """The model that is without e at the end, scored without e."""
    found = {
        name: np.exp(np.mean([run.metrics[-1]["dev_loss"] for run in results[name]]))
        for name in (UNFUSED, "rising, in evaluation too")
        if name in results
    }
    shown = ", ".join(f"{name} {value:.1f}" for name, value in found.items())
    return [f"After the last epoch, dropout on e at 1 in evaluation too, dev perplexity: {shown}."]


def _learning_curves(results: Results) -> "Figure":
    """The worst arm first, so that the legend is in the order of the lines."""
    lines = {}
    for name, runs in results.items():
        epochs = min(len(run.metrics) for run in runs)
        mean = [float(np.mean([run.metrics[i]["dev_loss"] for run in runs])) for i in range(epochs)]
        lines[name] = [(i + 1, math.exp(loss)) for i, loss in enumerate(mean)]
    shown = sorted((line for line in lines.items() if line[1]), key=lambda x: -min(x[1])[1])
    return curves(dict(shown), "epoch", "dev perplexity (per token)", log_y=True)


def _gains(losses: Losses) -> "Figure":
    """Against the unfused model of equal size, and against the control."""
    missing = Estimate(math.nan, math.nan, math.nan)
    panels = {}
    for reference in (UNFUSED, STATIC):
        found = differences(losses, reference)
        names = [n for n in losses if n not in [arm.name for arm in COUNTED]]
        panels[f"against {reference}"] = {n: [found.get(n, missing)] for n in names}
    return intervals(panels, "difference on test (nats a token; negative: better)")


def _add_trend(findings: Findings, losses: Mapping[int, Losses]) -> None:
    """Does the gain over the unfused model grow as data shrink, as the paper has it? The slope of
    a line through all sizes, documents drawn alike for all of them."""
    names = dict.fromkeys(name for those in losses.values() for name in differences(those, UNFUSED))
    points = {}
    for name in names:
        sizes = [n for n, those in losses.items() if name in those and UNFUSED in those]
        gains = [losses[n][name] - losses[n][UNFUSED] for n in sizes]
        points[name] = [(n, estimate(gain)) for n, gain in zip(sizes, gains, strict=True)]
        if len(sizes) < 2:
            continue
        x = np.log2(sizes) - np.mean(np.log2(sizes))
        slope = estimate(x @ np.stack(gains) / (x @ x))
        kind = "more text leaves less of a gain" if slope.low > 0 else "more text, larger gain"
        if slope.low <= 0 <= slope.high:
            kind = "no change is shown"
        findings.answer.append(
            f"{name} − {UNFUSED}, for each doubling of the text: {interval(slope, 3, True)} nats a "
            f"token over {len(sizes)} sizes: {kind}."
        )
    findings.figures["gain"] = curves(
        points,
        "training sentences",
        f"nats a token − {UNFUSED}",
        log_x=True,
        zero=True,
    )
