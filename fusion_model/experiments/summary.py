"""The README's science section, from saved results; nothing in it is typed by hand.

python -m fusion_model.experiments.summary docs/experiments README.md
"""

import json
import re
import sys
from itertools import compress
from pathlib import Path
from typing import Any

from fusion_model.experiments.reading.experiment import ALIGNMENT_NAMES, MILLI
from fusion_model.experiments.report import Table, interval, p_value
from fusion_model.experiments.statistics import Estimate
from fusion_model.files import write_text

START, END = "<!-- science, from docs/experiments -->\n", "\n<!-- end of science -->"


def section(folder: Path) -> str:
    """What every experiment under `folder` found, reading times first."""
    saved = [(p.parent.name, json.loads(p.read_text())) for p in folder.glob("*/results.json")]
    saved.sort(key=lambda s: (s[1]["experiment"] != "reading-times", s[0]))
    parts, settings = [], set()
    for name, results in saved:
        heading = f"**[{results['title']}](docs/{folder.name}/{name}/report.md).**"
        if results["setting"] not in settings and results["experiment"] != "examples":
            heading += f" {results['setting']}"  # several share theirs
        settings.add(results["setting"])
        answer = " ".join(results["answer"])
        if results["experiment"] == "reading-times":
            shown = " ".join(a for a in results["answer"] if "null result" in a)
            parts += [heading, reading_table(results["data"]), shown]
        elif results["experiment"] == "fusion":
            parts += [heading, perplexity_table(results["tables"]), answer]
        else:
            parts.append(f"{heading} {answer}")
    return "\n\n".join(parts)


def reading_table(data: dict[str, Any]) -> str:
    """Markdown: each model under each alignment; sentence context, spaces not corrected."""
    lines = [
        "| times | model | bits a word | Pearson's r | ΔLL, 10⁻³ nats a word "
        f"| minus {data['reference']} | p |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for fit in data["fits"]:
        if fit["context"] != "sentence" or fit["whitespace_correction"]:
            continue
        for name, model in fit["models"].items():
            versus = model["delta_versus"]
            lines.append(
                f"| {ALIGNMENT_NAMES[fit['alignment']]} | {name} "
                f"| {data['bits_per_word'][name]:.2f} "
                f"| {interval(Estimate(**model['r']))} | {_milli(model['delta'])} "
                f"| {_milli(versus, sign=True) if versus else ''} "
                f"| {p_value(versus['p']) if versus else ''} |"
            )
    return "\n".join(lines)


def perplexity_table(tables: list[dict[str, Any]]) -> str:
    """Markdown: arm, test perplexity, and the difference to the wider unfused model with its p."""
    full = next(t for t in tables if t["name"] == "perplexity")
    kept = [c in ("arm", "M parameters", "p") or c[:4] in ("test", "nats") for c in full["columns"]]
    columns, *rows = (list(compress(row, kept)) for row in (full["columns"], *full["rows"]))
    return Table("", "", columns, rows).markdown().strip()


def _milli(estimate: dict[str, float], sign: bool = False) -> str:
    return interval(Estimate(**estimate).scaled(MILLI), 1, sign)


def update(readme: str, folder: Path) -> str:
    """The README with its science section renewed."""
    pattern = re.escape(START) + r".*?" + re.escape(END)
    return re.sub(pattern, lambda _: START + section(folder) + END, readme, flags=re.DOTALL)


if __name__ == "__main__":
    path = Path(sys.argv[2])
    write_text(path, update(path.read_text(encoding="utf-8"), Path(sys.argv[1])))
