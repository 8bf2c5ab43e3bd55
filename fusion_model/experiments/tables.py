"""What every comparison of arms reports: perplexities, differences by documents and seeds."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fusion_model.experiments.arms import COUNTED, FUSED, STATIC, UNFUSED
from fusion_model.experiments.report import Findings, interval, p_value
from fusion_model.experiments.statistics import Estimate, estimate, holm, resampled_means
from fusion_model.experiments.study import Run, Study
from fusion_model.experiments.tuning import WHOLE

Results = Mapping[str, Sequence[Run]]
Losses = Mapping[str, np.ndarray]
"""Nats a token by arm, [1 + RESAMPLES]: as measured, then with other documents and seeds."""


def describe(study: Study, note: str, sentences: Sequence[int] = ()) -> str:
    """What was run, in a paragraph; nothing in it is typed by hand.

    Args:
        sentences: of training, where there are several sizes.
    """
    size, fields = study.size, study.size.training
    trained = ", ".join(f"{n:,}" for n in sentences or (size.sentences,))
    grids = "; ".join(
        f"{name.replace('_', ' ')} ({', '.join(f'{v:g}' for v in grid)})"
        for name, grid in size.grids.items()
    )
    at = f" at {size.tuned_at:,} sentences" if size.tuned_at else ""
    few = math.prod(map(len, size.grids.values())) <= WHOLE
    how = "one after the other from the middle of the grid"
    if few:
        how = "of all settings that were run"
    later = ", and at other sizes among what it chose there for any arm" if size.tuned_at else ""
    if later and len(size.prefix_dropouts) > 1:
        later += ", with every dropout on e"
    return (
        f"Size `{size.name}`: {trained} training, {size.dev:,} dev and at most {size.test:,} test "
        f"sentences, {study.texts.name}; V ≤ {fields['vocab_size']:,}, the same for all sizes, D = "
        f"{fields['embedding_size']}, H = {fields['hidden_size']} in concat and so fitted in the "
        f"others that all have its parameters; up to {study.seeds} seeds. For each arm, dev "
        f"chose with seed 0{at}, {how}{later}: {grids}. {note}"
    )


def losses_of(results: Results, test: Path) -> dict[str, np.ndarray]:
    """`Losses` of all arms on a text."""
    scores = {name: [run.scores(test) for run in runs] for name, runs in results.items()}
    if not scores:
        return {}
    tokens = next(iter(scores.values()))[0]["tokens"]
    sums = {name: np.stack([s["nats"] for s in found]) for name, found in scores.items()}
    return resampled_means(sums, tokens)


def differences(losses: Losses, reference: str) -> dict[str, Estimate]:
    """Nats a token, each arm minus the reference; p adjusted for the number of arms (Holm).
    None where the reference was not run."""
    if reference not in losses:
        return {}
    counted = [arm.name for arm in COUNTED]
    others = [name for name in losses if name != reference and name not in counted]
    found = {name: estimate(losses[name] - losses[reference]) for name in others}
    adjusted = holm([e.p or 0.0 for e in found.values()])
    return {
        name: dataclasses.replace(e, p=p)
        for (name, e), p in zip(found.items(), adjusted, strict=True)
    }


def perplexity_of(losses: np.ndarray) -> Estimate:
    """exp of nats a token; p is of no meaning."""
    return dataclasses.replace(estimate(np.exp(losses)), p=None)


def share(losses: Losses, name: str) -> Estimate | None:
    """What an arm gains beyond `static`, in percent of what `static` gains over `unfused`; None
    where `static` is not shown to gain."""
    if STATIC not in losses or UNFUSED not in losses or name in (STATIC, UNFUSED):
        return None
    lexical = losses[UNFUSED] - losses[STATIC]
    if estimate(lexical).low <= 0:
        return None
    return estimate(100 * (losses[STATIC] - losses[name]) / lexical)


def add_perplexities(
    findings: Findings, groups: Mapping[str, tuple[Results, Path]], of: str = ""
) -> dict[str, Losses]:
    """A table of one or several groups, of another size or another text; their losses.

    Args:
        of: what the groups are, for the head of their column.
    """
    against = (UNFUSED, STATIC)
    columns = [*([of] if of else []), "arm", "M parameters", "rate, dropout, on e", "seeds"]
    columns += ["perplexity", "2^nats"]
    for reference in against:
        columns += [f"nats − {reference}", "p"]
    rows, all_losses = [], dict[str, Losses]()
    for label, (results, test) in groups.items():
        losses = losses_of(results, test)
        all_losses[label] = losses
        found = [differences(losses, reference) for reference in against]
        for arm, runs in results.items():
            row = [label] if of else []
            row += [arm, f"{runs[0].result['parameters'] / 1e6:.2f}", settings_cell(runs[0])]
            row += [str(len(runs)), interval(perplexity_of(losses[arm]), 1)]
            row.append(f"{2 ** losses[arm][0]:.2f}")
            for differing in found:
                e = differing.get(arm)
                row += ["", ""] if e is None else [interval(e, 3, True), p_value(e.p)]
            beyond = share(losses, arm) if arm in found[0] else None
            rows.append([*row, "" if beyond is None else interval(beyond, 0, True)])
    caption = (
        "Perplexity a token, exp of nats; 2^nats is what the paper calls perplexity. Differences "
        "in nats a token, p adjusted by Holm within a text and size. The last column: what an arm "
        f"gains over {STATIC}, in percent of what {STATIC} gains over {UNFUSED}. Intervals of "
        "95 %: documents and seeds drawn anew, n − 1 of n, 4 000 times; one seed: documents only."
    )
    columns.append("% beyond static")
    findings.table("perplexity", caption, columns, rows, left=2 if of else 1)
    return all_losses


def answers(losses: Losses, where: str = "") -> list[str]:
    """What the fused arm, or the best one, gains over the unfused model and over `static`."""
    found = {reference: differences(losses, reference) for reference in (UNFUSED, STATIC)}
    fused = {n: e for n, e in found[UNFUSED].items() if n != STATIC and "AWD" not in n}
    if not fused:
        return []
    best = FUSED if FUSED in fused else min(fused, key=lambda n: fused[n].value)
    parts = []
    for reference, those in found.items():
        if best in those:
            before, after = (math.exp(losses[n][0]) for n in (reference, best))
            paper = " → ".join(f"{2 ** losses[n][0]:.2f}" for n in (reference, best))
            parts.append(
                f"against {reference} {interval(those[best], 3, True)} nats a token, p "
                f"{p_value(those[best].p)} (perplexity {before:.1f} → {after:.1f}, 2^nats {paper})"
            )
    beyond = share(losses, best)
    tail = "" if beyond is None else f"; beyond static {interval(beyond, 0, True)} % of its gain"
    return [f"{where}**{best}**: {'; '.join(parts)}{tail}."]


def compared_with(losses: Losses, reference: str, arms: Sequence[str]) -> list[str]:
    """Other arms against one of them, in a sentence."""
    found = differences(losses, reference)
    shown = [f"{name} {interval(found[name], 3, True)}" for name in arms if name in found]
    return [f"Nats a token against {reference}: {'; '.join(shown)}."] if shown else []


def grid_edges(study: Study, results: Results) -> list[str]:
    """Which arms met the limits of grids and epochs: beyond they might have been better."""
    parts = []
    for field, grid in study.size.grids.items():
        arms = [r[0] for r in results.values() if field in study.tuned_fields(r[0].arm)]
        if arms:
            at_edge = sum(getattr(run.options, field) in (grid[0], grid[-1]) for run in arms)
            parts.append(f"{at_edge} of {len(arms)} for {field.replace('_', ' ')}")
    epochs = study.size.training["epochs"]
    unfinished = [name for name, runs in results.items() if best_epoch(runs) == epochs]
    edges = [f"At the edge of a grid: {', '.join(parts)}."] if parts else []
    return [*edges, f"Best in the last epoch with every seed: {', '.join(unfinished) or 'none'}."]


def best_epoch(runs: Sequence[Run]) -> float:
    """The epoch of least dev loss, the mean over seeds."""
    return float(np.mean([run.best["epoch"] for run in runs]))


def settings_cell(run: Run) -> str:
    """Learning rate, dropout, and dropout on e where there is one."""
    options = run.options
    if not run.metrics:
        return ""
    shown = f"{options.learning_rate:g}, {options.dropout:g}"
    if options.fusion == "none":
        return shown
    schedule = options.prefix_dropout_schedule
    return f"{shown}, {f'{options.prefix_dropout:g}' if schedule == 'constant' else schedule}"
