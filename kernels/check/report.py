"""The results of a GPU check as a table that a person reads, and what they belong to."""

from collections.abc import Iterator, Mapping
from typing import Any

Results = Mapping[str, Any]


def _number(row: Mapping[str, Any], key: str) -> str:
    return format(row[key], ".2f") if row.get(key) is not None else ""


def _remarks(row: Mapping[str, Any]) -> str:
    found = []
    if "of_budget" in row:
        found.append(f"error {row['of_budget']:.2f} of the budget, {row['plan']}")
    keys = ("error", "us_error")
    found += [str(row[key]) for key in keys if key in row]
    if "cudnn" in row:
        found.append(f"cuDNN is {row['cudnn']}")
    if "baseline_us_error" in row:
        found.append(f"cuDNN or PyTorch: {row['baseline_us_error']}")
    return "; ".join([*found, *row.get("fell_back", []), *row.get("fallback", [])])


def _cells(row: Mapping[str, Any]) -> list[str]:
    per_step = row["us"] / row["steps"] if "us" in row and "steps" in row else None
    timed = dict(row) | {"per_step": per_step}
    figures = [_number(timed, k) for k in ("us", "per_step", "baseline_us", "ratio")]
    return [row["case"], "ok" if row["ok"] else "FAILED", *figures, _remarks(row)]


def _table(head: list[str], rows: Iterator[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) + " |"


def report(results: Results) -> str:
    """Markdown: machine, goals, then a table of every part."""
    of = ", ".join(f"{name} {value}" for name, value in results["machine"].items() if value)
    lines = [f"# GPU check: {results['failed']} failed, {results['seconds']:.0f} s", "", of, ""]
    goals = (
        [g["what"], f"{'≥' if g['at_least'] else '≤'} {g['bound']:g}", _number(g, "worst"),
         f"{g['measured']} of {g['rows']}", g["verdict"]]
        for g in results["goals"]
    )  # fmt: skip
    lines += _table(["goal", "needed", "worst", "rows measured", "verdict"], goals)
    head = ["case", "", "µs", "µs a step", "theirs µs", "times theirs", ""]
    for part, rows in results["parts"].items():
        lines += ["", f"## {part}", "", *_table(head, map(_cells, rows))]
    return "\n".join(lines) + "\n"
