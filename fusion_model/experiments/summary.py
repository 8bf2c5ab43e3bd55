"""The README's science section, from saved results; nothing in it is typed by hand.

python -m fusion_model.experiments.summary docs/experiments README.md
"""

import json
import re
import sys
from pathlib import Path

from fusion_model.files import write_text

START, END = "<!-- science, from docs/experiments -->\n", "\n<!-- end of science -->"


def section(folder: Path) -> str:
    """A table with a row an experiment under `folder`: its report, and what it answers first."""
    lines = ["| experiment | what came out |", "|---|---|"]
    for path in sorted(folder.glob("*/results.json")):
        found = json.loads(path.read_text())
        link = f"[{found['title']}](docs/{folder.name}/{path.parent.name}/report.md)"
        lines.append(f"| {link} | {' '.join(found['answer'][:2])} |")
    return "\n".join(lines)


def update(readme: str, folder: Path) -> str:
    """The README with its science section renewed."""
    pattern = re.escape(START) + r".*?" + re.escape(END)
    return re.sub(pattern, lambda _: START + section(folder) + END, readme, flags=re.DOTALL)


if __name__ == "__main__":
    path = Path(sys.argv[2])
    write_text(path, update(path.read_text(encoding="utf-8"), Path(sys.argv[1])))
