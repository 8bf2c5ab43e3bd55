"""What every comparison of arms reports: perplexities, paired differences, settings, times."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from fusion_model.experiments.arms import STATIC, WIDER
from fusion_model.experiments.report import Findings, interval, p_value
from fusion_model.experiments.statistics import Estimate, holm, mean_estimate, paired_losses
from fusion_model.experiments.study import Run, Study

GRIDS = {
    "learning_rate": "learning rate",
    "dropout": "dropout",
    "prefix_dropout": "dropout on e",
}
Results = Mapping[str, Sequence[Run]]


def describe(study: Study, note: str, sentences: Sequence[int] = ()) -> str:
    """What was run, in a paragraph; nothing in it is typed by hand.

    Args:
        sentences: of training, where there are several sizes.
    """
    size, fields = study.size, study.size.training
    trained = ", ".join(f"{n:,}" for n in sentences or (size.sentences,))
    grids = "; ".join(
        f"{GRIDS[name]} ({', '.join(f'{v:g}' for v in grid)})" for name, grid in size.grids.items()
    )
    return (
        f"Size `{size.name}`: {trained} training, {size.dev:,} dev and {size.test:,} test "
        f"sentences of {study.texts.name}; V ≤ {fields['vocab_size']:,}, D = "
        f"{fields['embedding_size']}, H = {fields['hidden_size']}, at most {fields['epochs']} "
        f"epochs, {study.seeds} seed{'s' if study.seeds > 1 else ''}. For each arm alike, dev "
        f"chose with seed 0, one after the other from the middle of the grid: {grids}. "
        f"{note}"
    )


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


def agreeing(results: Results, name: str, reference: str, test: str = "test") -> tuple[int, int]:
    """How many seeds have a difference of the sign of the mean one, and how many there are."""
    pairs = zip(results[name], results[reference], strict=True)
    found = [ours.scores(test).mean - theirs.scores(test).mean for ours, theirs in pairs]
    return sum((d < 0) == (np.mean(found) < 0) for d in found), len(found)


def better_arms(results: Results, reference: str, test: str = "test") -> list[str]:
    """Arms shown to be better: interval below 0, adjusted p below 0.05, and every seed agrees."""
    names = []
    for name, e in differences(results, reference, test).items():
        agree, seeds = agreeing(results, name, reference, test)
        if e.high < 0 and (e.p or 0) < 0.05 and agree == seeds:
            names.append(name)
    return names


def perplexity_of(runs: Sequence[Run], test: str = "test") -> Estimate:
    """exp of the mean over seeds of nats a token, with its t interval over seeds."""
    e = mean_estimate([run.scores(test).mean for run in runs])
    return Estimate(math.exp(e.value), math.exp(e.low), math.exp(e.high))


def add_perplexities(findings: Findings, results: Results) -> None:
    """Test perplexity, the paper's figure, and differences to the wider model and the control."""
    references = [name for name in (WIDER, STATIC.name) if name in results]
    against = {reference: differences(results, reference) for reference in references}
    columns = ["arm", "M parameters", "rate, dropout, on e", "best epoch", "test perplexity"]
    columns += ["2^nats", *(c for r in references for c in (f"nats − {r}", "p", "seeds"))]
    rows = []
    for name, runs in results.items():
        perplexity = perplexity_of(runs)
        row = [
            name,
            f"{runs[0].parameters / 1e6:.2f}",
            settings_cell(runs[0]),
            f"{best_epoch(runs):.1f}",
            interval(perplexity, 1),
            f"{2 ** math.log(perplexity.value):.2f}",
        ]
        for reference, found in against.items():
            row += difference_cells(found.get(name))
            agree = "{}/{}".format(*agreeing(results, name, reference))
            row.append("" if name == reference else agree)
        rows.append(row)
    caption = (
        "Perplexity a token on test, mean over seeds with its 95 % interval over seeds; 2^nats is "
        "what the paper calls perplexity. Differences in nats a token with 95 % intervals, paired "
        "by token, sentences as clusters, seeds averaged (so they are over sentences, not seeds), "
        "p adjusted by Holm; seeds: how many have a difference of that sign."
    )
    findings.table("perplexity", caption, columns, rows)


def best_epoch(runs: Sequence[Run]) -> float:
    """The epoch of least dev loss, the mean over seeds."""
    return float(np.mean([min(r.metrics, key=lambda m: m["dev_loss"])["epoch"] for r in runs]))


def difference_cells(estimate: Estimate | None) -> list[str]:
    return ["", ""] if estimate is None else [interval(estimate, 3, True), p_value(estimate.p)]


def answers(results: Results) -> list[str]:
    """Which arms are better than the unfused model of equal size, and than the control."""
    against = differences(results, WIDER)
    shown = better_arms(results, WIDER)
    name, best = min(against.items(), key=lambda item: item[1].value)
    sentences = [
        f"Of {len(against)} arms, {len(shown)} are better than {WIDER} on test (interval below 0, "
        "adjusted p below 0.05, every seed agrees). Lowest is "
        f"{name}: {interval(best, 3, True)} nats a token."
    ]
    if STATIC.name in results:
        beyond = better_arms(results, STATIC.name)
        over = differences(results, STATIC.name)
        listed = ", ".join(f"{n} {interval(over[n], 3, True)}" for n in beyond)
        sentences.append(
            f"Better than the {STATIC.name}, which has no context: {listed or 'none'}."
        )
    return sentences


def compared_with(results: Results, reference: str) -> str:
    """All other fused arms against one of them, in a sentence."""
    shown = [
        f"{name} {interval(e, 3, True)}"
        for name, e in differences(results, reference).items()
        if name not in (WIDER, STATIC.name) and results[name][0].options.fusion != "none"
    ]
    return f"Nats a token against {reference}: {'; '.join(shown)}."


def grid_edges(study: Study, results: Results) -> list[str]:
    """Which arms met the limits of grids and epochs: beyond they might have been better."""
    parts = []
    for field, grid in study.size.grids.items():
        arms = [r[0] for r in results.values() if field in study.tuned_fields(r[0].arm)]
        if arms:
            at_edge = sum(getattr(run.options, field) in (grid[0], grid[-1]) for run in arms)
            parts.append(f"{at_edge} of {len(arms)} for {GRIDS[field]}")
    if not parts:
        return []
    epochs = study.size.training["epochs"]
    unfinished = [name for name, runs in results.items() if best_epoch(runs) == epochs]
    return [
        f"Arms for which dev chose the edge of a grid: {', '.join(parts)}. Arms that were best "
        f"in the last epoch with every seed, and might gain from more: "
        f"{', '.join(unfinished) or 'none'}."
    ]


def settings_cell(run: Run) -> str:
    """Learning rate, dropout, and dropout on e where there is one."""
    options = run.options
    shown = f"{options.learning_rate:g}, {options.dropout:g}"
    if options.fusion == "none":
        return shown
    schedule = options.prefix_dropout_schedule
    on_e = f"{options.prefix_dropout:g}" if schedule == "constant" else schedule
    return f"{shown}, {on_e}"


def add_times(findings: Findings, study: Study, results: Results, which: str = "") -> None:
    """Seconds of encoding and of training, as they were when the runs were made."""
    rows = []
    for name, runs in results.items():
        encoding = ["", "", ""]
        if runs[0].options.fusion != "none":
            vectors, seconds = study.encoding(runs[0])
            rate = f"{vectors / seconds:,.0f}" if seconds else ""
            encoding = [f"{vectors:,}", f"{seconds:.1f}", rate]
        epochs = float(np.mean([len(run.metrics) for run in runs]))
        epoch = float(np.median([m["seconds"] for run in runs for m in run.metrics]))
        speed = float(np.median([m["tokens_per_second"] for r in runs for m in r.metrics]))
        rows.append([name, *encoding, f"{epochs * epoch:.1f}", f"{epochs:.1f}", f"{speed:,.0f}"])
    columns = ["arm", "prefixes encoded", "encoding, s", "prefixes/s", "training, s", "epochs"]
    caption = (
        "Wall-clock time of the runs themselves, on a machine that may have had other work. "
        "Encoding: training and dev text, once for all runs and arms that share encoder, pooling, "
        "view and policy, duplicates dropped. Training: a run with the chosen settings, its epochs "
        "times the median seconds of an epoch, without dev text; tokens/s: the median, too."
    )
    findings.table("times", caption + which, [*columns, "tokens/s"], rows)
