"""Experiment `examples`: how the distribution of the next word shifts with what came before."""

import textwrap
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusion_model.experiments.figures import intervals
from fusion_model.experiments.report import Findings, Table, plain_number
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
def next_word(lm: FusionLM, prefix: str) -> Tensor:
    """log p of every token after the prefix, [V]."""
    logits = lm.model(lm.prompt_ids(prefix), use_cache=False).logits[0, -1]
    return torch.log_softmax(logits.float(), dim=-1)


def shift(ours: Tensor, theirs: Tensor) -> float:
    """Jensen–Shannon divergence of two distributions in bits, 0 to 1; log p in, [V] each."""
    middle = torch.logaddexp(ours, theirs) - torch.log(torch.tensor(2.0))
    nats = 0.5 * sum(float((p.exp() * (p - middle)).sum()) for p in (ours, theirs))
    return nats / float(torch.log(torch.tensor(2.0)))


def run(
    models: Mapping[str, FusionLM],
    note: str,
    ending: str = ENDING,
    beginnings: Sequence[str] = BEGINNINGS,
) -> Findings:
    """The next words of every model after every beginning, and the shift from the ending alone."""
    findings = Findings(
        "examples",
        "How the next word shifts with the prefix",
        f"The words after “… {ending}”, by what stands before. The shift is the Jensen–Shannon "
        "divergence, in bits, from the same model's distribution after the ending alone. " + note,
    )
    rows, panel = [], {}
    alone = {name: next_word(lm, ending.capitalize()) for name, lm in models.items()}
    for beginning in ("", *beginnings):
        shifts = []
        for name, lm in models.items():
            prefix = f"{beginning} {ending}" if beginning else ending.capitalize()
            log_p = next_word(lm, prefix)
            top = log_p.topk(SHOWN)
            words = ", ".join(
                f"{str(lm.tokenizer.decode([i])).strip()} {100 * p:.1f} %"
                for i, p in zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
            )
            value = shift(log_p, alone[name])
            shifts.append(value)
            rows.append([f"{beginning} …" if beginning else "…", name, words, plain_number(value)])
        if beginning:
            panel[textwrap.shorten(beginning, 32, placeholder=" …")] = [
                Estimate(v, v, v) for v in shifts
            ]
    findings.tables.append(
        Table("next-words", findings.setting, ["before", "model", "next", "shift"], rows, left=3)
    )
    findings.figures["shift"] = intervals(
        {f"“… {ending}”": panel}, "shift of the next word (bits)", list(models), zero=True
    )
    means = [sum(row[i].value for row in panel.values()) / len(panel) for i in range(len(models))]
    findings.answer.append(
        "Mean shift: "
        + "; ".join(f"{n} {plain_number(m)} bits" for n, m in zip(models, means, strict=True))
        + "."
    )
    return findings
