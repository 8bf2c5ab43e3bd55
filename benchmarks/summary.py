"""The README's table and plot, from the results that it names.

    pytest benchmarks/test_*_*.py --benchmark-enable --benchmark-json=benchmarks/results/NAME.json
    fusion-lm bench --quick                        # appends to benchmarks/results/*.jsonl
    python -m fusion_model.benchmarks.policies     # writes policies/policies.json
    python -m fusion_model.benchmarks.summary      # in the clone: rewrites README.md and the plot

The table is of what pytest-benchmark saved, the plot of the last run of a `.jsonl` file.
"""

import json
import re
from pathlib import Path
from typing import Any

from fusion_model.benchmarks.measure.machine import where
from fusion_model.benchmarks.measure.records import measured, read
from fusion_model.benchmarks.page.page import overview
from fusion_model.benchmarks.policies import table as policies_table

from fusion_model.files import write_text

RATES = ("tokens_per_second", "prefixes_per_second")
# What is compared, with what, and the unit: label, baseline, its name, ours.
ROWS = [
    *(
        (what, f"test_{what}_published", "published loop", f"test_{what}_fusion_lm")
        for what in ("training", "evaluation")
    ),
    *(
        (
            f"prefix embeddings, {d}",
            f"test_encoding[{d}-{way}]",
            name,
            f"test_encoding[{d}-fusion-lm]",
        )
        for d in ("float32", "bfloat16")
        for way, name in (
            ("one-at-a-time", "one at a time"),
            ("sentence-transformers-32", "sentence-transformers, batch 32"),
            ("sentence-transformers-128", "sentence-transformers, batch 128"),
        )
    ),
]


def table(results: dict[str, Any]) -> str:
    """Markdown: rates in 1/s, and ours over theirs, of one run."""
    rate: dict[str, float] = {}
    for benchmark in results["benchmarks"]:
        for key in RATES:
            if key in benchmark["extra_info"]:
                rate[benchmark["name"]] = benchmark["extra_info"][key]
    lines = ["| | baseline | per second | fusion-lm, per second | ratio |", "|---|---|--:|--:|--:|"]
    for label, theirs, name, ours in ROWS:
        if theirs in rate and ours in rate:
            a, b = rate[theirs], rate[ours]
            lines.append(f"| {label} | {name} | {a:,.0f} | {b:,.0f} | **{b / a:,.3g}×** |")
    return "\n".join(lines)


BLOCK = re.compile(r"(<!-- (policies |plot |)from (\S+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def renew(readme: str, root: Path) -> tuple[str, dict[Path, str]]:
    """The README with table and plot as their results have them, and the plot's file.

    Args:
        root: folder that the README's paths start from.
    """
    plots: dict[Path, str] = {}

    def renewed(found: re.Match[str]) -> str:
        start, kind, name, end = found.groups()
        path = root / name
        if kind == "plot ":
            run, records = read(path)[-1]
            machine, image = run["machine"], path.with_suffix(".svg")
            plots[image] = overview(measured(records))
            place = image.relative_to(root).as_posix()
            body = f"![Speed of each backend relative to plain PyTorch]({place})"
        else:
            loaded = json.loads(path.read_text(encoding="utf-8"))
            machine = loaded["machine" if kind else "machine_info"]
            body = policies_table(loaded) if kind else table(loaded)
        return f"{start}{body}\n\n{where(machine)}{end}"

    return BLOCK.sub(renewed, readme), plots


def main() -> None:
    """Bring README.md in the current folder up to date."""
    root = Path.cwd()
    readme, plots = renew((root / "README.md").read_text(encoding="utf-8"), root)
    for path, text in {root / "README.md": readme, **plots}.items():
        write_text(path, text)
        print(f"wrote {path.relative_to(root)}")


if __name__ == "__main__":
    main()
