"""The README's table, from what pytest-benchmark saved.

pytest benchmarks --benchmark-enable --benchmark-json=benchmarks/results/NAME.json
python -m fusion_model.benchmarks.summary benchmarks/results/NAME.json
"""

import json
import sys
from pathlib import Path
from typing import Any

RATES = ("tokens_per_second", "prefixes_per_second")
ENCODING = "test_encoding[{dtype}-{way}]"
# What is compared, with what, and the unit: label, baseline, its name, ours.
ROWS = [
    ("training", "test_training_published", "published loop", "test_training_fusion_lm"),
    ("evaluation", "test_evaluation_published", "published loop", "test_evaluation_fusion_lm"),
    *(
        (
            f"prefix embeddings, {dtype}",
            ENCODING.format(dtype=dtype, way=way),
            name,
            ENCODING.format(dtype=dtype, way="fusion-lm"),
        )
        for dtype in ("float32", "bfloat16")
        for way, name in (
            ("one-at-a-time", "one at a time"),
            ("sentence-transformers-32", "sentence-transformers, batch 32"),
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


def where(results: dict[str, Any]) -> str:
    """Device, versions and date of a run."""
    machine = results["machine_info"]
    device = machine["gpu"] or f"{machine['threads']} CPU cores ({machine['cpu']['brand_raw']})"
    return f"{device}, torch {machine['torch']}, {results['datetime'][:10]}"


if __name__ == "__main__":
    loaded = json.loads(Path(sys.argv[1]).read_text())
    print(table(loaded) + "\n\n" + where(loaded))
