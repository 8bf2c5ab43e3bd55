"""The tables and the plot of README and docs, all from one run.

    python -m fusion_model.benchmarks.summary            # in the clone: rewrites pages and plot
    python -m fusion_model.benchmarks.summary --measure  # measures first, on a quiet machine

A block of a page names its kind and a file of results: the last run there that has it.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from fusion_model.benchmarks.measure.machine import where
from fusion_model.benchmarks.measure.records import file_of, measured, read
from fusion_model.benchmarks.page.page import overview
from fusion_model.benchmarks.suite.bench import bench
from fusion_model.benchmarks.suite.cases import EAGER, cases

from fusion_model.errors import FusionLMError
from fusion_model.files import write_text

PAGES = ("README.md", "docs/benchmarks.md", "docs/encodings.md")
LEVEL = 0.05  # a ratio so near to 1 is level
Record = dict[str, Any]
Cells = list[str]


def markdown(head: Cells, rows: Iterable[Cells]) -> str:
    """A table; its columns are of numbers but for the first."""
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rates(records: Sequence[Record], operation: str, dtype: str = "float32") -> dict[str, float]:
    """How many a second by each backend, of the operation's first shape."""
    own = [r for r in records if r["operation"] == operation and r["dtype"] == dtype]
    return {r["backend"]: r["per_second"] for r in own if r["group"] == own[0]["group"]}


def ratio(ours: float, theirs: float) -> str:
    """In words where there is no difference."""
    found = ours / theirs
    return "level" if abs(found - 1) <= LEVEL else f"**{found:.2g}×**"


# What a user chooses between: operation, label, plain PyTorch, ours where no policy is named.
CHOICES = (
    ("training", "training, embeddings at hand", (EAGER,)),
    ("evaluation", "surprisal, embeddings at hand", (EAGER,)),
    ("scoring", "surprisal, from text", ("batched", EAGER)),
    ("generation", "text, token by token", (EAGER,)),
)


def choices(records: Sequence[Record]) -> str:
    """Tokens a second by the published way, by plain PyTorch, and by ours."""
    rows = []
    for operation, label, plain in CHOICES:
        found = rates(records, operation)
        if found:
            theirs = next(found[name] for name in plain if name in found)
            ours = found.get("auto/incremental") or found["auto"]
            numbers = [f"{x:,.0f}" for x in (found["published"], theirs, ours)]
            rows.append([label, *numbers, ratio(ours, theirs)])
    head = ["tokens a second", "published way", "plain PyTorch", "fusion-lm", "to plain PyTorch"]
    return markdown(head, rows) if rows else ""


NAMES = {
    "published": "published way",
    EAGER: "plain PyTorch, one by one",
    "batched": "plain PyTorch, in batches",
    "auto": "fusion-lm, PyTorch",
    "onnx": "fusion-lm, ONNX fp32",
    "onnx-int8": "fusion-lm, ONNX int8",
}


def ways(records: Sequence[Record]) -> str:
    """Generation and scoring from text: each way with each policy."""
    made, scored = rates(records, "generation"), rates(records, "scoring")
    rows = []
    for way, name in NAMES.items():
        for backend in dict.fromkeys([*made, *scored]):
            if backend.partition("/")[0] == way:
                plain = way in ("published", EAGER, "batched")
                policy = backend.partition("/")[2] or ("every" if plain else "the model's own")
                ms = f"{1e3 / made[backend]:.2f}" if backend in made else ""
                speeds = (f"{x[backend]:,.0f}" if backend in x else "" for x in (made, scored))
                rows.append([name, policy, ms, *speeds])
    head = ["way", "policy", "a token, ms", "generation, tokens/s", "scoring, tokens/s"]
    return markdown(head, rows) if rows else ""


def encodings(records: Sequence[Record]) -> str:
    """Prefix embeddings: each way in each precision, to the best of sentence-transformers."""
    own = [r for r in records if r["operation"] == "embedding" and "exact" in r]
    dtypes = list(dict.fromkeys(r["dtype"] for r in own))
    head = ["way", "vectors", "pooling", "encoder tokens a prefix"]
    rows: dict[str, dict[str, Any]] = {}
    for dtype in dtypes:
        found = rates(own, "embedding", dtype)
        theirs = [x for name, x in found.items() if name.startswith("sentence-")]
        best = max(theirs or found.values())
        head += [f"{dtype}: prefixes/s", "ratio"]
        for r in own:
            if r["dtype"] == dtype:
                cells = rows.setdefault(r["backend"], {"first": r})
                cells[dtype] = [f"{r['per_second']:,.0f}", f"{r['per_second'] / best:.2f}×"]
    lines = []
    for backend, cells in rows.items():
        way, _, variant = backend.partition("/")
        policy, _, pooling = variant.partition(" ")
        tokens = cells["first"].get("tokens_per_prefix")
        label = {EAGER: "one at a time", "fusion-lm": policy}.get(way, f"{way}, batch {variant}")
        exact = "exact" if cells["first"].get("exact") else "approximate"
        start = [label, exact, pooling or "mean", "" if tokens is None else f"{tokens:.2f}"]
        lines.append(start + [c for dtype in dtypes for c in cells.get(dtype, ["", ""])])
    return markdown(head, lines) if lines else ""


TABLES: dict[str, Callable[[Sequence[Record]], str]] = {
    "choices": choices,
    "ways": ways,
    "encodings": encodings,
    "plot": overview,
}
BLOCK = re.compile(rf"<!-- ({'|'.join(TABLES)}) from (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def renew(page: str, root: Path, folder: Path, name: str = "") -> tuple[str, dict[Path, str]]:
    """A page with tables and plot as their results have them, and the plot's file.

    Args:
        page: its text.
        root: folder that the names of results start from.
        folder: the page's, which links start from.
        name: of the results, in place of those that the blocks name.

    Raises:
        FusionLMError: the results have no such table.
    """
    plots: dict[Path, str] = {}

    def renewed(found: re.Match[str]) -> str:
        kind, source = found[1], name or found[2]
        tried = ((TABLES[kind](measured(r)), run) for run, r in reversed(read(root / source)))
        body, run = next((pair for pair in tried if pair[0]), ("", {}))
        if not body:
            raise FusionLMError(f"{source} has no run with {kind}")
        if kind == "plot":
            image = (root / source).with_suffix(".svg")
            plots[image] = body
            place = Path(os.path.relpath(image, folder)).as_posix()
            body = f"![Speed of each backend relative to plain PyTorch]({place})"
        start = f"<!-- {kind} from {source} -->"
        return f"{start}\n{body}\n\n{where(run['machine'])}\n<!-- end -->"

    return BLOCK.sub(renewed, page), plots


def main(
    measure: Annotated[bool, typer.Option(help="run the cases of all tables first")] = False,
    only: Annotated[list[str] | None, typer.Option(help="with --measure: as of bench")] = None,
) -> None:
    """Bring the pages in the current folder up to date."""
    root, name = Path.cwd(), ""
    if measure:
        folder, command = root / "benchmarks" / "results", " ".join(sys.argv)
        chosen = cases("figures", only or ())
        run, _ = bench(chosen, "figures", "fusion-lm-small", (), "cpu", folder, command)
        name = file_of(folder, run).relative_to(root).as_posix()
    for path in map(root.joinpath, PAGES):
        page, plots = renew(path.read_text(encoding="utf-8"), root, path.parent, name)
        for file, text in {path: page, **plots}.items():
            write_text(file, text)
            print(f"wrote {file.relative_to(root)}")


if __name__ == "__main__":
    typer.run(main)
