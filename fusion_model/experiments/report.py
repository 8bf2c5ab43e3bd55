"""What an experiment found, written for people (Markdown, figures) and programs (JSON)."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_model.experiments.statistics import Estimate
from fusion_model.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Text cells under a caption.

    Attributes:
        left: how many columns, from the first, are aligned left.
    """

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def markdown(self) -> str:
        rule = ["---" if i < self.left else "--:" for i in range(len(self.columns))]
        lines = [list(self.columns), rule, *([str(c) for c in row] for row in self.rows)]
        body = "\n".join("| " + " | ".join(c.replace("|", "\\|") for c in r) + " |" for r in lines)
        return f"{body}\n\n{self.caption}"


@dataclass
class Findings:
    """An experiment's outcome.

    Attributes:
        name, title: of the experiment.
        setting: what was run, one line.
        note: ends the caption of every table that `table` adds.
        answer: what came out, sentences made from the results.
        tables, figures: by file name without ending.
        data: figures behind the text, for programs.
        notes: what only the run's own folder says, in `notes.md`.
    """

    name: str
    title: str
    setting: str
    note: str = ""
    answer: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, "Figure"] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def table(
        self,
        name: str,
        caption: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        left: int = 1,
    ) -> None:
        """Add a `Table`."""
        self.tables.append(Table(name, f"{caption} {self.note}".strip(), columns, rows, left))

    def write(self, out: Path) -> Path:
        """`report.md`, `notes.md`, `results.json`, a `.png` and `.pdf` a figure."""
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in self.figures.items():
            figure.savefig(out / f"{name}.png", dpi=200)
            # Without a date the same results give the same file.
            figure.savefig(out / f"{name}.pdf", metadata={"CreationDate": None})
        parts = [f"# {self.title}", self.setting, *self.answer]
        parts += [f"![{name}]({name}.png)" for name in self.figures]
        parts += [table.markdown() for table in self.tables]
        write_text(out / "notes.md", "\n\n".join(self.notes) + "\n")
        report = out / "report.md"
        write_text(report, "\n\n".join(parts) + "\n")
        saved = {
            "experiment": self.name,
            "title": self.title,
            "setting": self.setting,
            "answer": self.answer,
            "tables": [asdict(t) for t in self.tables],
            "data": self.data,
        }
        write_text(out / "results.json", json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
        return report


def signed(value: float, digits: int = 3) -> str:
    """With a sign always, a true minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def interval(estimate: Estimate, digits: int = 3, sign: bool = False) -> str:
    """`0.321 [0.301, 0.340]`; without an interval where there is none."""
    number = (lambda x: signed(x, digits)) if sign else (lambda x: plain_number(x, digits))
    if math.isnan(estimate.low):
        return number(estimate.value)
    return f"{number(estimate.value)} [{number(estimate.low)}, {number(estimate.high)}]"


def plain_number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace("-", "−")


def p_value(p: float | None) -> str:
    """`0.012`, `<0.001`; empty where there was no test."""
    if p is None:
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"
