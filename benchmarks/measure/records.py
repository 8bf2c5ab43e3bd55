"""Results as JSON lines, appended and never overwritten.

A run's first line is `{"kind": "run", …}`: an id, the machine, the ceilings measured on it. Then
one line a case, with the run's id: `case` (measured), `skip` (this machine cannot, and why) or
`wrong` (the result was not the reference's, so it was not timed).
"""

import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fusion_model.benchmarks.measure.ceilings import Ceilings
from fusion_model.benchmarks.measure.machine import checkout

from fusion_model.errors import FusionLMError

Record = dict[str, Any]
UNEVEN = 3


def run_line(machine: Record, ceilings: Ceilings, **more: Any) -> Record:
    """The first line of a run; `more` says how to repeat it."""
    return {
        "kind": "run",
        "run": uuid.uuid4().hex[:12],
        "machine": machine,
        "ceilings": {
            "flops": {dtype: float(f"{x:.4g}") for dtype, x in ceilings.flops.items()},
            "bandwidth": [[size, float(f"{x:.4g}")] for size, x in ceilings.bandwidth],
        },
    } | more


def home() -> Path | None:
    """Where results are kept unless a folder is named: `out/bench` of a clone, which git ignores.

    `benchmarks/results` holds what was committed on purpose.
    """
    root = checkout()
    return None if root is None else root / "out" / "bench"


def file_of(folder: Path, run: Record) -> Path:
    """Where a run goes: one file a device and day."""
    machine = run["machine"]
    return folder / f"{machine['date'][:10]}-{machine['device']}.jsonl"


def append(folder: Path, run: Record, records: Iterable[Record]) -> Iterator[Record]:
    """Pass the records on, each written as it comes: an interrupted run keeps what it has."""
    path = file_of(folder, run)
    folder.mkdir(parents=True, exist_ok=True)
    if path.exists():  # without the half line that a killed run left
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    with open(path, "a", encoding="utf-8", buffering=1) as file:
        file.write(json.dumps(run) + "\n")
        for record in records:
            file.write(json.dumps(record | {"run": run["run"]}) + "\n")
            yield record


def read(path: Path) -> list[tuple[Record, list[Record]]]:
    """All runs of a file, oldest first, each with its records.

    Raises:
        FusionLMError: not such a file.
    """
    runs: dict[str, tuple[Record, list[Record]]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record["kind"] == "run":
                runs[record["run"]] = (record, [])
            else:
                runs[record["run"]][1].append(record)
    except OSError as error:
        raise FusionLMError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FusionLMError(f"{path} is not a file of benchmark results: {error}") from error
    if not runs:
        raise FusionLMError(f"{path} holds no run")
    return list(runs.values())


def measured(records: Iterable[Record]) -> list[Record]:
    """Only what was timed."""
    return [r for r in records if r["kind"] == "case"]


def is_even(record: Record) -> bool:
    """Whether the machine did nothing else meanwhile: p90 is at most `UNEVEN` times p50."""
    return bool(record["p90_ms"] <= UNEVEN * record["p50_ms"])
