"""Experiment `examples`: how the distribution of the next word shifts with what came before."""

import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fusion_model.experiments.figures import intervals
from fusion_model.experiments.report import Findings, interval, plain_number
from fusion_model.experiments.statistics import Estimate
from fusion_model.language_model import FusionLM

ENDING = "finally faced the"
BEGINNINGS = (
    "The accused, brought in by two officers,",
    "After a night of storm the captain of the ship",
    "Alone with the lion in the narrow cage, the tamer",
    "The soldiers, tired and far from home,",
    "When the music stopped, the shy young pianist",
)
SHOWN = 5


@torch.inference_mode()
def next_token(lm: FusionLM, prefix: str) -> Tensor:
    """log p of every token after the prefix, [V]."""
    logits = lm.model(lm.prompt_ids(prefix), use_cache=False).logits[0, -1]
    return torch.log_softmax(logits.float(), dim=-1)


def shown(lm: FusionLM, log_p: Tensor) -> str:
    """The most likely tokens with their probabilities; a token may begin a longer word."""
    top = log_p.topk(SHOWN)
    pairs = zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
    return ", ".join(f"{str(lm.tokenizer.decode([t])).strip()} {100 * p:.1f} %" for t, p in pairs)


def shift(ours: Tensor, theirs: Tensor) -> float:
    """Jensen–Shannon divergence of two distributions in bits, 0 to 1; log p in, [V] each."""
    middle = torch.logaddexp(ours, theirs) - math.log(2)
    return 0.5 * sum(float((p.exp() * (p - middle)).sum()) for p in (ours, theirs)) / math.log(2)


def run(models: Mapping[str, Sequence[FusionLM]], note: str) -> Findings:
    """The next tokens of every model after every beginning, and the shift from the ending alone.

    Args:
        models: by name, one a seed; their probabilities are averaged for the tokens shown, and
            of their shifts mean, least and most.
    """
    findings = Findings(
        "examples",
        "How the next word shifts with the prefix",
        f"The tokens after “… {ENDING}”, by what stands before; a token may begin a longer "
        "word. The shift is the Jensen–Shannon divergence, in bits, from the same model's "
        "distribution after the ending alone; the mean over seeds, the least and the most. "
        "Probabilities are means over seeds, too. " + note,
    )
    rows: list[list[str]] = []
    panel: dict[str, list[Estimate]] = {}
    start = ENDING.capitalize()
    alone = {name: [next_token(lm, start) for lm in lms] for name, lms in models.items()}
    for beginning in ("", *BEGINNINGS):
        prefix = f"{beginning} {ENDING}" if beginning else start
        shifts = []
        for name, lms in models.items():
            log_p = [next_token(lm, prefix) for lm in lms]
            mean = torch.stack(log_p).logsumexp(0) - math.log(len(lms))
            moves = [shift(p, q) for p, q in zip(log_p, alone[name], strict=True)]
            shifts.append(Estimate(float(np.mean(moves)), min(moves), max(moves)))
            moved = interval(shifts[-1]) if beginning else ""
            rows.append([f"{beginning} …" if beginning else "…", name, shown(lms[0], mean), moved])
        if beginning:
            panel[textwrap.shorten(beginning, 32, placeholder=" …")] = shifts
    columns = ["before", "model", "next", "shift"]
    findings.table("next-words", findings.setting, columns, rows, left=3)
    findings.figures["shift"] = intervals(
        {f"“… {ENDING}”": panel}, "shift of the next word (bits)", list(models)
    )
    means = [sum(row[i].value for row in panel.values()) / len(panel) for i in range(len(models))]
    shown_means = (f"{n} {plain_number(m)} bits" for n, m in zip(models, means, strict=True))
    findings.answer.append(f"Mean shift: {'; '.join(shown_means)}.")
    return findings
