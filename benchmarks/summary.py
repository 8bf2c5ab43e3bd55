"""The tables and the plot of README and docs, from the results that they name.

    pytest benchmarks/test_*_*.py --benchmark-enable --benchmark-json=benchmarks/results/NAME.json
    fusion-lm bench --quick                        # appends to benchmarks/results/*.jsonl
    python -m fusion_model.benchmarks.policies     # writes policies/policies.json
    python -m fusion_model.benchmarks.summary      # in the clone: rewrites the pages and the plot

`from` names what pytest-benchmark saved; `choices` and `plot` the last run of a `.jsonl` file;
`policies` what that module wrote.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_model.benchmarks.measure.machine import where
from fusion_model.benchmarks.measure.records import measured, read
from fusion_model.benchmarks.page.page import overview
from fusion_model.benchmarks.policies import table as policies_table

from fusion_model.files import write_text

PAGES = ("README.md", "docs/benchmarks.md", "docs/encodings.md")
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


CHOICES = {  # what a user chooses between: operation, and the backend of each column
    "training": ("training, tokens", "published", "eager"),
    "embedding": ("prefix embeddings", "eager", "sentence-transformers"),
    "scoring": ("surprisal from text, tokens", "published", "eager"),
    "generation": ("text, tokens", "published", "eager"),
}


def choices(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: how many a second in float32, by the published way, by PyTorch, and by ours."""
    lines = [
        "| a second | published way | plain PyTorch | fusion-lm | to plain PyTorch |",
        "|---|--:|--:|--:|--:|",
    ]
    for operation, (label, *others) in CHOICES.items():
        own = [r for r in records if r["operation"] == operation and r["dtype"] == "float32"]
        rate = {r["backend"]: r["per_second"] for r in own}
        published, plain, ours = (
            *(rate[name] for name in others),
            rate.get("auto") or rate["fusion-lm"],
        )
        note = " (sentence-transformers)" if others[1] != "eager" else ""
        lines.append(
            f"| {label} | {published:,.0f} | {plain:,.0f}{note} | {ours:,.0f} "
            f"| **{ours / plain:.2g}×** |"
        )
    return "\n".join(lines)


BLOCK = re.compile(
    r"(<!-- (choices |policies |plot |)from (\S+) -->\n).*?(<!-- end -->)", re.DOTALL
)


def renew(page: str, root: Path, folder: Path) -> tuple[str, dict[Path, str]]:
    """A page with tables and plot as their results have them, and the plot's file.

    Args:
        page: its text.
        root: folder that the names of results start from.
        folder: the page's, which links start from.
    """
    plots: dict[Path, str] = {}

    def renewed(found: re.Match[str]) -> str:
        start, kind, name, end = found.groups()
        path = root / name
        if kind in ("plot ", "choices "):
            run, records = read(path)[-1]
            machine = run["machine"]
        if kind == "choices ":
            body = choices(measured(records))
        elif kind == "plot ":
            image = path.with_suffix(".svg")
            plots[image] = overview(measured(records))
            place = Path(os.path.relpath(image, folder)).as_posix()
            body = f"![Speed of each backend relative to plain PyTorch]({place})"
        else:
            loaded = json.loads(path.read_text(encoding="utf-8"))
            machine = loaded["machine" if kind else "machine_info"]
            body = policies_table(loaded) if kind else table(loaded)
        return f"{start}{body}\n\n{where(machine)}\n{end}"

    return BLOCK.sub(renewed, page), plots


def main() -> None:
    """Bring the pages in the current folder up to date."""
    root = Path.cwd()
    for path in map(root.joinpath, PAGES):
        page, plots = renew(path.read_text(encoding="utf-8"), root, path.parent)
        for file, text in {path: page, **plots}.items():
            write_text(file, text)
            print(f"wrote {file.relative_to(root)}")


if __name__ == "__main__":
    main()
