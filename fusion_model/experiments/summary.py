"""The table of `docs/experiments.md`, from saved results; nothing in it is typed by hand.

python -m fusion_model.experiments.summary docs/experiments/medium docs/experiments.md
"""

import json
import re
import sys
from pathlib import Path

from fusion_model.files import write_text

FIRST = 6  # answers of each experiment
START, END = "<!-- from docs/experiments/medium -->\n", "\n<!-- end -->"


def section(folder: Path) -> str:
    """A table with a row an experiment under `folder`: its report, and what it answers first."""
    reports = sorted(folder.glob("*/results.json"))
    if not reports:
        return "No experiment of size `medium` has been reported yet."
    lines = ["| experiment | what came out |", "|---|---|"]
    for path in reports:
        found = json.loads(path.read_text())
        link = f"experiments/{folder.name}/{path.parent.name}/report.md"
        lines.append(f"| [{found['title']}]({link}) | {' '.join(found['answer'][:FIRST])} |")
    return "\n".join(lines)


def update(page: str, folder: Path) -> str:
    """The page, which stands beside the folder's, with its table renewed."""
    pattern = re.escape(START) + r".*?" + re.escape(END)
    return re.sub(pattern, lambda _: START + section(folder) + END, page, flags=re.DOTALL)


if __name__ == "__main__":
    path = Path(sys.argv[2])
    write_text(path, update(path.read_text(encoding="utf-8"), Path(sys.argv[1])))
