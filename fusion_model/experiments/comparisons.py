"""The experiments that train arms and compare their losses: all but `reading-times`, `examples`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fusion_model.config import EARLY, LATE
from fusion_model.errors import FusionLMError
from fusion_model.experiments.arms import STATIC, WIDER
from fusion_model.experiments.figures import curves, intervals
from fusion_model.experiments.report import Findings, Table, interval, p_value, plain_number
from fusion_model.experiments.statistics import Estimate, holm, mean_estimate, paired_losses
from fusion_model.experiments.study import Arm, Run, Study
from fusion_model.experiments.texts import Texts, plain_name, write_test, write_texts
from fusion_model.text import Document

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
GRIDS = {
    "learning_rate": "learning rate",
    "dropout": "dropout",
    "prefix_dropout": "dropout on e",
}
Results = Mapping[str, Sequence[Run]]


def run(
    name: str,
    study: Study,
    arms: Sequence[Arm],
    corpora: Mapping[str, Sequence[Document]],
    encoder_note: str,
) -> Findings:
    """Train, compare and report one of `TITLES`; the arms are those of `arms_of`."""
    if name == "data-size":
        return _data_size(study, arms, corpora, encoder_note)
    if name == "domain":
        study.texts = _with_domains(study, corpora)
    results = study.results(arms)
    findings = Findings(name, TITLES[name], describe(study, encoder_note))
    findings.tables.append(perplexity_table(results, encoder_note))
    findings.tables.append(times_table(study, results, encoder_note))
    findings.answer = [*_answers(results), *_grid_edges(study, results)]
    if name == "fusion":
        findings.answer.append(_early_and_late(results))
    if name == "policy":
        _add_costs(findings, study, results, encoder_note)
    if name == "domain":
        _add_domains(findings, results, list(study.texts.tests), encoder_note)
    else:
        findings.figures["dev-perplexity"] = _learning_curves(results)
        findings.figures["test-differences"] = _gains(results)
    return findings


def describe(study: Study, encoder_note: str, sentences: Sequence[int] = ()) -> str:
    """What was run, in a paragraph; nothing in it is typed by hand.

    Args:
        sentences: of training, where there are several sizes.
    """
    size, fields = study.size, study.size.training
    trained = ", ".join(f"{n:,}" for n in sentences or (size.sentences,))
    grids = "; ".join(f"{GRIDS[field]} ({_list(grid)})" for field, grid in size.grids.items())
    return (
        f"Size `{size.name}`: {trained} training, {size.dev:,} dev and {size.test:,} test "
        f"sentences of {study.texts.name}; V ≤ {fields['vocab_size']:,}, D = "
        f"{fields['embedding_size']}, H = {fields['hidden_size']}, at most {fields['epochs']} "
        f"epochs, {study.seeds} seed{'s' if study.seeds > 1 else ''}. For each arm alike, dev "
        f"chose with seed 0, one after the other from the middle of the grid: {grids}. "
        f"{encoder_note}"
    )


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def average(runs: Sequence[Run], test: str = "test") -> np.ndarray:
    """Loss of every test token, the mean over seeds, [N]."""
    return np.mean([run.scores(test).nats for run in runs], axis=0)


def differences(results: Results, reference: str, test: str = "test") -> dict[str, Estimate]:
    """Nats a token, each arm minus the reference; p adjusted for the number of arms (Holm)."""
    theirs = average(results[reference], test)
    sentences = results[reference][0].scores(test).sentences
    found = {
        name: paired_losses(average(runs, test), theirs, sentences)
        for name, runs in results.items()
        if name != reference
    }
    adjusted = holm([e.p or 0.0 for e in found.values()])
    return {
        name: dataclasses.replace(e, p=p)
        for (name, e), p in zip(found.items(), adjusted, strict=True)
    }


def perplexity_of(runs: Sequence[Run], test: str = "test") -> Estimate:
    """exp of the mean over seeds of nats a token, with its t interval over seeds."""
    e = mean_estimate([run.scores(test).mean for run in runs])
    return Estimate(math.exp(e.value), math.exp(e.low), math.exp(e.high))


def perplexity_table(results: Results, encoder_note: str) -> Table:
    """Test perplexity, the paper's figure, and differences to the wider unfused model."""
    against = differences(results, WIDER)
    static = differences(results, STATIC.name) if STATIC.name in results else {}
    rows = []
    for name, runs in results.items():
        perplexity = perplexity_of(runs)
        nats = math.log(perplexity.value)
        row = [
            name,
            f"{runs[0].parameters / 1e6:.2f}",
            _settings(runs[0]),
            f"{best_epoch(runs):.1f}",
            interval(perplexity, 1),
            f"{2**nats:.2f}",
            *_difference(against.get(name)),
        ]
        rows.append(row + (_difference(static.get(name)) if static else []))
    columns = [
        "arm",
        "M parameters",
        "rate, dropout, on e",
        "best epoch",
        "test perplexity",
        "2^nats",
    ]
    columns += [f"nats − {WIDER}", "p"] + ([f"nats − {STATIC.name}", "p"] if static else [])
    caption = (
        "Perplexity a token on test, mean over seeds with its 95 % interval over seeds; 2^nats is "
        "what the paper calls perplexity. Differences in nats a token with 95 % intervals, paired "
        "by token, sentences as clusters, seeds averaged (so they are over sentences, not seeds), "
        "p adjusted by Holm. " + encoder_note
    )
    return Table("perplexity", caption, columns, rows)


def best_epoch(runs: Sequence[Run]) -> float:
    """The epoch of least dev loss, the mean over seeds."""
    return float(np.mean([min(r.metrics, key=lambda m: m["dev_loss"])["epoch"] for r in runs]))


def _early_and_late(results: Results) -> str:
    """Whether early fusion is done sooner, as the paper has it."""
    parts = []
    for family, modes in (("late", LATE), ("early", EARLY)):
        epochs = [best_epoch(results[mode]) for mode in modes]
        parts.append(f"{np.mean(epochs):.1f} for {family} fusion ({', '.join(modes)})")
    return f"Best epoch on dev, the mean over modes and seeds: {', '.join(parts)}."


def _difference(estimate: Estimate | None) -> list[str]:
    return ["", ""] if estimate is None else [interval(estimate, 3, True), p_value(estimate.p)]


def _answers(results: Results) -> list[str]:
    against = differences(results, WIDER)
    shown = [f for f in against.items() if f[1].high < 0 and (f[1].p or 0) < 0.05]
    answers = [
        f"Of {len(against)} arms, {len(shown)} are better than {WIDER} on test (interval below 0, "
        "adjusted p below 0.05)."
    ]
    name, best = min(against.items(), key=lambda item: item[1].value)
    answers[0] += f" Lowest is {name}: {interval(best, 3, True)} nats a token."
    if STATIC.name in results:
        over = differences(results, STATIC.name)
        beyond = [n for n, e in over.items() if e.high < 0 and (e.p or 0) < 0.05]
        answers.append(
            f"Better than the {STATIC.name}, which has no context: {', '.join(beyond) or 'none'}."
        )
    return answers


def _grid_edges(study: Study, results: Results) -> list[str]:
    """How many arms took a value at the edge of its grid: beyond it might have been better."""
    parts = []
    for field, grid in study.size.grids.items():
        arms = [r[0] for r in results.values() if field in study.tuned_fields(r[0].arm)]
        if arms:
            at_edge = sum(getattr(run.options, field) in (grid[0], grid[-1]) for run in arms)
            parts.append(f"{at_edge} of {len(arms)} for {GRIDS[field]}")
    return [f"Arms for which dev chose the edge of a grid: {', '.join(parts)}."] if parts else []


def _settings(run: Run) -> str:
    """Learning rate, dropout, and dropout on e where there is one."""
    options = run.options
    shown = f"{options.learning_rate:g}, {options.dropout:g}"
    if options.fusion == "none":
        return shown
    schedule = options.prefix_dropout_schedule
    on_e = f"{options.prefix_dropout:g}" if schedule == "constant" else schedule
    return f"{shown}, {on_e}"


def times_table(study: Study, results: Results, encoder_note: str) -> Table:
    """Seconds of encoding and of training, as they were when the runs were made."""
    rows = []
    for name, runs in results.items():
        encoding = ["", "", ""]
        if runs[0].options.fusion != "none":
            vectors, seconds = study.encoding(runs[0])
            rate = f"{vectors / seconds:,.0f}" if seconds else ""
            encoding = [f"{vectors:,}", f"{seconds:.1f}", rate]
        training = [run.seconds for run in runs]
        epochs = [len(run.metrics) for run in runs]
        speed = float(np.median([m["tokens_per_second"] for r in runs for m in r.metrics]))
        rows.append(
            [name, *encoding, f"{np.mean(training):.1f}", f"{np.mean(epochs):.1f}", f"{speed:,.0f}"]
        )
    columns = ["arm", "prefixes encoded", "encoding, s", "prefixes/s", "training, s", "epochs"]
    caption = (
        "Wall-clock time of the runs themselves, other work on the machine included. Encoding: "
        "training and dev text, once for all runs and arms that share encoder, pooling, view and "
        "policy, duplicates dropped. Training: a run with the chosen settings, the mean over "
        "seeds, without dev text; tokens/s: the median over epochs. " + encoder_note
    )
    return Table("times", caption, [*columns, "tokens/s"], rows)


def _learning_curves(results: Results) -> "Figure":
    lines = {}
    for name, runs in results.items():
        epochs = min(len(run.metrics) for run in runs)
        mean = [float(np.mean([run.metrics[i]["dev_loss"] for run in runs])) for i in range(epochs)]
        lines[name] = [(i + 1, math.exp(loss)) for i, loss in enumerate(mean)]
    return curves(lines, "epoch", "dev perplexity (per token)", log_y=True)


def _gains(results: Results) -> "Figure":
    panels = {f"against {WIDER}": {n: [e] for n, e in differences(results, WIDER).items()}}
    return intervals(panels, "difference on test (nats a token; negative: better)", zero=True)


def resized(study: Study, sentences: int, documents: Sequence[Document]) -> Study:
    """The same study with more or fewer training sentences; dev and test text stay."""
    size = dataclasses.replace(study.size, sentences=sentences)
    texts = write_texts(
        study.texts.name, documents, (sentences, size.dev, size.test), study.texts.train.parent
    )
    return Study(size, texts, study.out, study.encoder, study.seeds)


def _data_size(
    study: Study,
    arms: Sequence[Arm],
    corpora: Mapping[str, Sequence[Document]],
    encoder_note: str,
) -> Findings:
    """Each size is a study of its own on the same dev and test text."""
    sizes = study.size.data_sizes
    note = describe(study, encoder_note, sizes)
    findings = Findings("data-size", TITLES["data-size"], note)
    gains: dict[str, list[tuple[float, Estimate]]] = {}
    rows = []
    for sentences in sizes:
        part = resized(study, sentences, corpora[study.texts.name])
        results = part.results(arms)
        findings.answer += [
            f"With {sentences:,}: {answer}" for answer in _grid_edges(part, results)
        ]
        for name, estimate in differences(results, WIDER).items():
            gains.setdefault(name, []).append((sentences, estimate))
        for name, runs in results.items():
            per_word = float(np.mean([run.scores("test").per_word for run in runs]))
            difference = gains[name][-1][1] if name in gains else None
            rows.append(
                [
                    f"{sentences:,}",
                    name,
                    interval(perplexity_of(runs), 1),
                    plain_number(per_word),
                    *_difference(difference),
                ]
            )
    findings.tables.append(
        Table(
            "data-size",
            "Test perplexity a token and nats a word (each size has its own vocabulary, so only "
            "the latter compares across sizes); differences in nats a token. " + encoder_note,
            ["sentences", "arm", "test perplexity", "nats a word", f"nats − {WIDER}", "p"],
            rows,
            left=2,
        )
    )
    findings.figures["gain"] = curves(
        {name: [(n, e.value) for n, e in points] for name, points in gains.items()},
        "training sentences",
        f"nats a token − {WIDER}",
        log_x=True,
        errors={name: [(e.low, e.high) for _, e in points] for name, points in gains.items()},
        zero=True,
    )
    findings.tables.append(times_table(part, results, encoder_note))
    for name, points in gains.items():
        first, last = points[0], points[-1]
        findings.answer.append(
            f"{name}, against {WIDER}: {interval(first[1], 3, True)} nats a token with "
            f"{first[0]:,} sentences, {interval(last[1], 3, True)} with {last[0]:,}."
        )
    return findings


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


def _add_costs(findings: Findings, study: Study, results: Results, encoder_note: str) -> None:
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
    findings.tables.append(
        Table(
            "cost",
            "Encoder work: tokens through all of the encoder's layers for each token of the test "
            "text, duplicates dropped; test perplexity a token; and the share of what the best "
            "exact arm (`every`) gains over the static control: below 0 is worse than the "
            "control. " + encoder_note,
            ["policy", "encoder tokens a token", "test perplexity", "share of the exact gain"],
            rows,
        )
    )
    findings.figures["cost"] = curves(
        {name: [(cost, found[name].value)] for name, cost in work.items()},
        "encoder tokens a token (logarithmic from 1)",
        "test perplexity (per token)",
        errors={name: [(e.low, e.high)] for name, e in found.items()},
        symlog_x=True,
        integer_x=False,
    )


def _add_domains(
    findings: Findings, results: Results, tests: Sequence[str], encoder_note: str
) -> None:
    rows, panel = [], {}
    names = [name for name in results if name != WIDER]
    for test in tests:
        found = differences(results, WIDER, test)
        label = "same domain" if test == "test" else test
        panel[label] = [found[name] for name in names]
        for name, runs in results.items():
            row = [label, name, interval(perplexity_of(runs, test), 1)]
            rows.append(row + _difference(found.get(name)))
    findings.tables.append(
        Table(
            "domains",
            "Test perplexity a token by domain; differences in nats a token. Trained on the first "
            "two thirds of the corpus' documents; its others are domains here. " + encoder_note,
            ["tested on", "arm", "test perplexity", f"nats − {WIDER}", "p"],
            rows,
            left=2,
        )
    )
    findings.figures["domains"] = intervals(
        {f"against {WIDER}": panel}, "difference (nats a token; negative: better)", names, True
    )
