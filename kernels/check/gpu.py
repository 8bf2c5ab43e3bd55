"""The whole check of a GPU: parts in processes of their own, results as they come.

A kernel that fails may leave the device unusable for its process, and one that hangs never
returns. So each part is a process that says which case it begins; one that takes too long, or
dies, is ended, that case is noted, and a new process goes on with the next. Correctness comes
first, several parts at a time; then times, one part at a time. It ends within `BUDGET` whatever
happens, and `results.json` holds all that is known at any moment.
"""

import asyncio
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from fusion_model.kernels.check.cases import TYPES, Named, Result
from fusion_model.kernels.check.report import report

BUDGET = 460.0  # seconds for everything
FOR_CHECKS = 240.0  # of them at most for correctness
START = 150.0  # seconds for a process to begin its first case: eight import at once
END = 10.0  # and to end: the driver may hold it
PROCESS = [sys.executable, "-m", "fusion_model.kernels.check.gpu"]


@dataclass(frozen=True)
class Part:
    """Cases that run in one process after the other.

    Attributes:
        home: `module:function` that lists them for a device; more, each after a colon, are
            literal arguments.
        each: seconds that one case may take.
        timed: runs with nothing beside it.
    """

    home: str
    each: float = 60.0
    timed: bool = False

    def cases(self, device: torch.device) -> list[Named]:
        module, function, *argument = self.home.split(":")
        return list(getattr(importlib.import_module(module), function)(device, *argument))


_HERE = "fusion_model.kernels.check"
CHECKS = {
    "hangs": Part(f"{_HERE}.hangs:hangs", 20),
    **{f"sequence {dtype}": Part(f"{_HERE}.cases:check:sequence:{dtype}") for dtype in TYPES},
    "prefix": Part(f"{_HERE}.cases:check:prefix"),
    "surprisal": Part(f"{_HERE}.cases:check:surprisal"),
    "token": Part(f"{_HERE}.decode_cases:check"),
    "repeats": Part(f"{_HERE}.cases:repeats"),
    "token repeats": Part(f"{_HERE}.decode_cases:repeats"),
    "graphs": Part(f"{_HERE}.cases:replays"),
    "token graphs": Part(f"{_HERE}.decode_cases:replays"),
}


def work_off(part: Part, skip: int, device: torch.device, out: TextIO) -> None:
    """The cases of a part from `skip` on, in this process: lines of JSON, written at once."""
    from fusion_model.kernels.triton import guards

    def tell(**line: Any) -> None:
        print(json.dumps(line), file=out, flush=True)

    cases = part.cases(device)
    tell(plan=[name for name, _ in cases])
    for name, run in cases[skip:]:
        tell(begin=name)
        guards.refused.clear()
        result: Result
        try:
            result = {"case": name} | run()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            result = {"case": name, "ok": False, "error": text[:500]}
        # Else PyTorch's numbers and times would pass for the kernels'.
        if fallen := [" ".join(map(str, key)) for key in guards.refused]:
            result |= {"ok": False, "fell_back": fallen}
        tell(result=result)
        if device.type == "cuda" and any(key.endswith("error") for key in result):
            torch.rand(1, device=device)  # raises, and ends this process: after a capture that
            torch.cuda.synchronize()  # failed, or if the device is lost


async def run_part(
    name: str, part: Part, device: str, began: float, seconds: float, add: Callable[..., None]
) -> None:
    """Adds rows, one for each case; the process is started anew after a case that ended it.

    Args:
        began: on the clock `time.monotonic`; `seconds` later no case goes on.
    """
    until = began + seconds
    plan, done, reason = [name], 0, ""  # the part's name stands for its cases until it lists them
    while done < len(plan) and time.monotonic() < until:
        begun, useful = "", False  # the case under way; whether the process began any
        with tempfile.TemporaryFile() as errors:
            process = await asyncio.create_subprocess_exec(
                *PROCESS, part.home, str(done), device,
                stdout=asyncio.subprocess.PIPE, stderr=errors, limit=1 << 24,
            )  # fmt: skip
            assert process.stdout is not None
            try:
                while done < len(plan) and time.monotonic() < until:
                    limit = part.each if begun else START
                    left = min(limit, until - time.monotonic())
                    text = await asyncio.wait_for(process.stdout.readline(), left)
                    if not text.endswith(b"\n"):
                        await asyncio.wait_for(process.wait(), END)
                        errors.seek(0)
                        said = errors.read().decode(errors="replace")[-300:]
                        reason = f"exit {process.returncode}: {said}"
                        break
                    line = json.loads(text)
                    plan, begun = line.get("plan", plan), line.get("begin", "")
                    useful = useful or bool(begun)
                    if "result" in line:
                        add(line["result"])
                        done += 1
            except TimeoutError:
                reason = f"not done within {limit:.0f} s"
            finally:
                with suppress(ProcessLookupError, TimeoutError):
                    process.kill()
                    await asyncio.wait_for(process.wait(), END)
        if begun and time.monotonic() < until:
            add({"case": begun, "ok": False, "error": reason})
            done += 1
        if not useful:  # nor would the next process begin a case
            break
    if time.monotonic() >= until:
        reason = f"{seconds:.0f} s were over"
    add(*({"case": case, "ok": False, "error": f"not run: {reason}"} for case in plan[done:]))


def run_parts(
    parts: Mapping[str, Part],
    out: Path,
    tell: Callable[[str], None],
    jobs: int = 0,
    device: str = "cuda",
    machine: Mapping[str, Any] | None = None,
    judge: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """All parts; `results.json` and `report.md` in `out` say all that is known at any moment.

    Args:
        jobs: checks at a time; 0: as many as there are cores, at most 8.
        machine: what the results belong to.
        judge: called with the results so far; adds goals.
    """
    began = time.monotonic()
    rows: dict[str, list[Result]] = {name: [] for name in parts}
    results: dict[str, Any] = {"machine": machine or {}, "parts": {}, "goals": [], "failed": 0}

    def write() -> None:
        results["parts"] = {name: found for name, found in rows.items() if found}
        judge(results)
        results["failed"] = sum(not row["ok"] for found in rows.values() for row in found)
        results["seconds"] = round(time.monotonic() - began, 1)
        for name, text in (("results.json", json.dumps(results, indent=1) + "\n"),
                           ("report.md", report(results))):  # fmt: skip
            temporary = out / f"{name}.tmp"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(out / name)

    async def phase(names: Iterable[str], seconds: float, at_once: int) -> None:
        slots = asyncio.Semaphore(at_once)

        async def one(name: str) -> None:
            def add(*more: Result) -> None:
                rows[name] += more
                write()

            async with slots:
                await run_part(name, parts[name], device, began, seconds, add)
            tell(f"{name}: {sum(row['ok'] for row in rows[name])} of {len(rows[name])}")

        await asyncio.gather(*map(one, names))

    write()  # else a run that is killed at once would leave those of the one before
    timed = [name for name, part in parts.items() if part.timed]
    checks = [name for name in parts if name not in timed]
    jobs = jobs or min(8, os.cpu_count() or 1)
    asyncio.run(phase(checks, FOR_CHECKS if timed else BUDGET, jobs))
    asyncio.run(phase(timed, BUDGET, 1))
    write()
    return results


if __name__ == "__main__":
    home, skip, kind = sys.argv[1:]
    if kind == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no line of ours
    work_off(Part(home), int(skip), torch.device(kind), lines)
