"""The experiments that train arms and compare their losses: all but `reading-times`, `examples`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fusion_model.config import EARLY, LATE
from fusion_model.data.text import Document
from fusion_model.errors import FusionLMError
from fusion_model.experiments.arms import STATIC, WIDER
from fusion_model.experiments.corpora import Texts, plain_name, write_test, write_texts
from fusion_model.experiments.figures import curves, intervals
from fusion_model.experiments.report import Findings, interval, plain_number, signed
from fusion_model.experiments.statistics import Estimate
from fusion_model.experiments.study import Arm, Study
from fusion_model.experiments.tables import (
    Results,
    add_perplexities,
    add_times,
    answers,
    best_epoch,
    better_arms,
    compared_with,
    describe,
    difference_cells,
    differences,
    grid_edges,
    perplexity_of,
    settings_cell,
)
from fusion_model.training.options import TrainingOptions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "fusion": "Ways to fuse",
    "data-size": "Less training data",
    "domain": "Other domains",
    "encoder": "Encoders and poolings",
    "view": "What the encoder sees",
    "schedule": "Dropout on the embedding, rising and falling",
    "policy": "How often the encoder runs: cost against perplexity",
}
# What the arms of an experiment vary, at its usual value.
COMPARED = {"view": "prefix", "schedule": "constant dropout", "policy": "every"}


def run(
    name: str,
    study: Study,
    arms: Sequence[Arm],
    corpora: Mapping[str, Sequence[Document]],
    note: str,
) -> Findings:
    """Train, compare and report one of `TITLES`; the arms are those of `arms_of`.

    Args:
        note: on the encoder, for every table.
    """
    sizes = study.size.data_sizes if name == "data-size" else ()
    findings = Findings(name, TITLES[name], describe(study, note, sizes), note)
    if name == "data-size":
        _add_sizes(findings, study, arms, corpora[study.texts.name])
        return findings
    if name == "domain":
        study.texts = _with_domains(study, corpora)
    results = study.results(arms)
    add_perplexities(findings, results)
    add_times(findings, study, results)
    findings.answer = [*answers(results), *grid_edges(study, results)]
    if name in COMPARED:
        findings.answer.insert(2, compared_with(results, COMPARED[name]))
    if name == "fusion":
        findings.answer.append(_early_and_late(results))
    if name == "policy":
        _add_costs(findings, study, results)
    if name == "domain":
        _add_domains(findings, results, list(study.texts.tests))
    else:
        findings.figures["dev-perplexity"] = _learning_curves(results)
        findings.figures["test-differences"] = _gains(results)
    return findings


def _early_and_late(results: Results) -> str:
    """Whether early fusion is done sooner, as the paper has it."""
    parts = []
    for family, modes in (("late", LATE), ("early", EARLY)):
        epochs = [best_epoch(results[mode]) for mode in modes]
        parts.append(f"{np.mean(epochs):.1f} for {family} fusion ({', '.join(modes)})")
    return f"Best epoch on dev, the mean over modes and seeds: {', '.join(parts)}."


def _learning_curves(results: Results) -> "Figure":
    """The worst arm first, so that the legend is in the order of the lines."""
    lines = {}
    for name, runs in results.items():
        epochs = min(len(run.metrics) for run in runs)
        mean = [float(np.mean([run.metrics[i]["dev_loss"] for run in runs])) for i in range(epochs)]
        lines[name] = [(i + 1, math.exp(loss)) for i, loss in enumerate(mean)]
    lines = dict(sorted(lines.items(), key=lambda line: -min(y for _, y in line[1])))
    return curves(lines, "epoch", "dev perplexity (per token)", log_y=True)


def _gains(results: Results) -> "Figure":
    """Against the unfused model of equal size, and against the control."""
    missing = Estimate(math.nan, math.nan, math.nan)
    panels = {}
    for reference in (WIDER, STATIC.name):
        found = differences(results, reference)
        panels[f"against {reference}"] = {n: [found.get(n, missing)] for n in results}
    return intervals(panels, "difference on test (nats a token; negative: better)", zero=True)


def resized(study: Study, sentences: int, documents: Sequence[Document]) -> Study:
    """The same study with more or fewer training sentences; dev and test text stay.

    With fewer, epochs and patience grow as the text shrinks: as many steps are taken, so that
    arms differ in what they learn from little text and not in how fast they learn.
    """
    more = max(study.size.sentences / sentences, 1.0)
    patience = round(study.size.training.get("patience", TrainingOptions.patience) * more)
    epochs = {"epochs": round(study.size.training["epochs"] * more), "patience": patience}
    training = study.size.training | epochs
    size = dataclasses.replace(study.size, sentences=sentences, training=training)
    texts = write_texts(
        study.texts.name, documents, (sentences, size.dev, size.test), study.texts.train.parent
    )
    return Study(size, texts, study.out, study.encoder, study.seeds)


def _add_sizes(
    findings: Findings, study: Study, arms: Sequence[Arm], documents: Sequence[Document]
) -> None:
    """Each size is a study of its own on the same dev and test text."""
    gains: dict[str, list[tuple[float, Estimate]]] = {}
    rows, edges = [], []
    for sentences in study.size.data_sizes:
        part = resized(study, sentences, documents)
        results = part.results(arms)
        edges += [f"{sentences:,} sentences: {answer}" for answer in grid_edges(part, results)]
        found = differences(results, WIDER)
        for name, runs in results.items():
            scores = [run.scores("test") for run in runs]
            difference = None
            if name in found:
                difference = found[name].scaled(len(scores[0].nats) / scores[0].words)
                gains.setdefault(name, []).append((sentences, difference))
            per_word = plain_number(float(np.mean([s.per_word for s in scores])))
            perplexity = interval(perplexity_of(runs), 1)
            cells = [f"{sentences:,}", name, settings_cell(runs[0]), perplexity, per_word]
            rows.append([*cells, *difference_cells(difference)])
    columns = ["sentences", "arm", "rate, dropout, on e", "test perplexity", "nats a word"]
    findings.table(
        "data-size",
        "Test perplexity a token, and nats a word with differences: each size has a vocabulary of "
        "its own, so that only these compare across sizes. Fewer sentences are trained on for more "
        "epochs, as many steps. p adjusted by Holm within a size.",
        [*columns, f"nats a word − {WIDER}", "p"],
        rows,
        left=2,
    )
    add_times(findings, part, results, f" {sentences:,} sentences.")
    findings.figures["gain"] = curves(
        {name: [(n, e.value) for n, e in points] for name, points in gains.items()},
        "training sentences",
        f"nats a word − {WIDER}",
        x_scale="log",
        errors={name: [(e.low, e.high) for _, e in points] for name, points in gains.items()},
        zero=True,
    )
    findings.answer = [_trend(name, points) for name, points in gains.items()] + edges


def _trend(name: str, points: Sequence[tuple[float, Estimate]]) -> str:
    """Does the gain over the unfused model grow as data shrink, as the paper has it?"""
    (few, first), (many, last) = points[0], points[-1]
    if first.high < last.low:
        verdict = "the gain is larger with less text"
    elif last.high < first.low:
        verdict = "the gain is larger with more text"
    else:
        verdict = "the intervals overlap"
    return (
        f"{name}, against {WIDER}: {interval(first, 3, True)} nats a word with {few:,} sentences, "
        f"{interval(last, 3, True)} with {many:,}: {verdict}."
    )


def _with_domains(study: Study, corpora: Mapping[str, Sequence[Document]]) -> Texts:
    """Trained on two thirds of the corpus' documents; the others, and other corpora, are tests."""
    own = list(corpora[study.texts.name])
    cut = max(1, round(len(own) * 2 / 3))
    domains: dict[str, Sequence[Document]] = {plain_name(Path(d.name).stem): [d] for d in own[cut:]}
    domains |= {
        plain_name(name): docs for name, docs in corpora.items() if name != study.texts.name
    }
    if not domains:
        raise FusionLMError("domain needs other texts to test on: give --data several corpora")
    size, folder = study.size, study.texts.train.parent
    sizes = (size.sentences, size.dev, size.test)
    texts = write_texts(study.texts.name, own[:cut], sizes, folder)
    tests = {name: write_test(name, docs, size.test, folder) for name, docs in domains.items()}
    return dataclasses.replace(texts, tests=texts.tests | tests)


def _add_costs(findings: Findings, study: Study, results: Results) -> None:
    """Encoder work of each policy beside its perplexity."""
    found = {name: perplexity_of(runs) for name, runs in results.items()}
    work = {
        name: study.encoder_work(runs[0]) if runs[0].options.fusion != "none" else 0.0
        for name, runs in results.items()
    }
    static = found[STATIC.name].value
    gain = static - min(e.value for name, e in found.items() if name.split(",")[0] == "every")
    rows = []
    for name, cost in work.items():
        share = f"{(static - found[name].value) / gain:.0%}" if cost and gain > 0 else ""
        rows.append([name, f"{cost:.2f}", interval(found[name], 1), share])
    findings.table(
        "cost",
        "Encoder work: tokens through all of the encoder's layers for each token of the test text, "
        "duplicates dropped; test perplexity a token; and the share of what the best exact arm "
        "(`every`) gains over the static control: below 0 is worse than the control.",
        ["policy", "encoder tokens a token", "test perplexity", "share of the exact gain"],
        rows,
    )
    findings.figures["cost"] = curves(
        {name: [(cost, found[name].value)] for name, cost in work.items()},
        "encoder tokens a token (logarithmic from 1)",
        "test perplexity (per token)",
        errors={name: [(e.low, e.high)] for name, e in found.items()},
        x_scale="symlog",
    )


def _add_domains(findings: Findings, results: Results, tests: Sequence[str]) -> None:
    """The gain over the unfused model in the training domain, and in the others."""
    rows, panel = [], {}
    names = [name for name in results if name != WIDER]
    kept: dict[str, list[str]] = {name: [] for name in names}
    for test in tests:
        found = differences(results, WIDER, test)
        better = better_arms(results, WIDER, test)
        label = "same domain" if test == "test" else test
        panel[label] = [found[name] for name in names]
        for name, runs in results.items():
            row = [label, name, interval(perplexity_of(runs, test), 1)]
            rows.append(row + difference_cells(found.get(name)))
        for name in better:
            kept[name] += [] if test == "test" else [label]
    for i, name in enumerate(names):
        own, *others = (row[i] for row in panel.values())
        values = [e.value for e in others]
        findings.answer.append(
            f"{name}, against {WIDER}: {interval(own, 3, True)} nats a token in its own domain, "
            f"{signed(min(values))} to {signed(max(values))} in the others, where it is better in "
            f"{len(kept[name])} of {len(others)}."
        )
    findings.table(
        "domains",
        "Test perplexity a token by domain; differences in nats a token, p adjusted by Holm within "
        "a domain. Trained on the first two thirds of the corpus' documents; its others are "
        "domains here.",
        ["tested on", "arm", "test perplexity", f"nats − {WIDER}", "p"],
        rows,
        left=2,
    )
    findings.figures["domains"] = intervals(
        {f"against {WIDER}": panel}, "difference (nats a token; negative: better)", names, True
    )
