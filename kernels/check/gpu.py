"""The whole check of a GPU: parts in processes of their own, results as they come.

A kernel that fails may leave the device unusable for its process, and one that hangs never
returns. So each part is a process that says which case it begins; one that takes too long, or
dies, is ended, that case is noted, and a new process goes on with the next. Correctness comes
first, several parts at a time; then times, one part at a time. It ends within `BUDGET` whatever
happens, and `results.json` holds all that is known at any moment.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fusion_model.kernels.check.cases import TYPES, Named, Result
from fusion_model.kernels.check.report import report

BUDGET = 460.0  # seconds for everything
FOR_CHECKS = 240.0  # of them at most for correctness
START = 60.0  # seconds for a process to begin its first case
POLL = 0.1
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
        found: list[Named] = getattr(importlib.import_module(module), function)(device, *argument)
        return found


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


def work_off(part: Part, out: Path, skip: int, device: torch.device) -> None:
    """The cases of a part from `skip` on, in this process: lines of JSON, written at once."""
    from fusion_model.kernels.triton import guards

    with open(out, "a", encoding="utf-8") as file:

        def tell(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        cases = part.cases(device)
        tell(plan=[name for name, _ in cases])
        for name, run in cases[skip:]:
            tell(begin=name)
            known = set(guards.checked)
            result: Result
            try:
                result = {"case": name} | run()
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                result = {"case": name, "ok": False, "error": text[:500]}
            # Else PyTorch's numbers and times would pass for the kernels'.
            new = set(guards.checked) - known
            if fallen := [" ".join(map(str, k)) for k in new if not guards.checked[k]]:
                result |= {"ok": False, "fell_back": fallen}
            tell(result=result)
            if "error" in result and device.type == "cuda":
                torch.cuda.synchronize()  # raises, and ends this process, if the device is lost


class Worker:
    """One part: its process, which is started anew after a case that ended it."""

    def __init__(self, name: str, part: Part, folder: Path, device: str) -> None:
        self.name, self.part, self.device = name, part, device
        self.lines = folder / f"{name.replace(' ', '-')}.jsonl"
        self.lines.unlink(missing_ok=True)
        self.results: list[Result] = []
        self.plan: list[str] | None = None
        self.begun: str | None = None  # the case that is under way
        self.over = False
        self.process: subprocess.Popen[bytes] | None = None
        self._read = 0
        self._useful = False  # the process at hand began a case

    def start(self) -> None:
        """A process for the cases that are left."""
        command = [*PROCESS, self.part.home, str(self.lines), str(len(self.results)), self.device]
        errors = open(self.lines.with_suffix(".err"), "wb")  # noqa: SIM115  (the process's)
        with errors:
            self.process = subprocess.Popen(command, stdout=errors, stderr=errors)
        self._since, self._useful = time.monotonic(), False

    def poll(self) -> bool:
        """Takes in what is new; ends what takes too long. Whether anything changed."""
        assert self.process is not None
        ended = self.process.poll() is not None  # before reading: nothing is written later
        fresh = self._take()
        if self.over:
            return fresh
        waited = time.monotonic() - self._since
        limit = START if self.begun is None else self.part.each
        if not ended and waited > limit:
            self._kill()
            self._failed(f"not done within {limit:.0f} s")
        elif ended and self.plan is not None and len(self.results) == len(self.plan):
            self.over = True
        elif ended:
            text = self.lines.with_suffix(".err").read_text(errors="replace")
            self._failed(f"exit {self.process.returncode}: {text[-300:]}")
        else:
            return fresh
        return True

    def stop(self, reason: str) -> None:
        """Ends the part; what was not run is noted."""
        self._kill()
        self._take()
        left = [self.name] if self.plan is None else self.plan[len(self.results) :]
        for case in left:
            self.results.append({"case": case, "ok": False, "error": f"not run: {reason}"})
        self.over = True

    def close(self) -> None:
        for path in (self.lines, self.lines.with_suffix(".err")):
            path.unlink(missing_ok=True)

    def _take(self) -> bool:
        whole = (
            self.lines.read_text(encoding="utf-8").split("\n")[:-1] if self.lines.exists() else []
        )
        fresh = whole[self._read :]
        self._read = len(whole)
        for line in map(json.loads, fresh):
            self._since = time.monotonic()
            if "plan" in line:
                self.plan = line["plan"]
            elif "begin" in line:
                self.begun, self._useful = line["begin"], True
            elif "result" in line:
                self.results.append(line["result"])
                self.begun = None
        return bool(fresh)

    def _failed(self, reason: str) -> None:
        """The case under way ended its process: on with the next, in another."""
        if not self._useful:  # nor would the next process begin a case
            return self.stop(reason)
        if self.begun is not None:
            self.results.append({"case": self.begun, "ok": False, "error": reason})
        self.begun = None
        if self.plan is not None and len(self.results) < len(self.plan):
            self.start()
        else:
            self.over = True

    def _kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # the driver may hold it
                self.process.wait(10)


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
        judge: called with the results so far; adds floors and goals.
    """
    began = time.monotonic()
    jobs = jobs or min(8, os.cpu_count() or 1)
    results: dict[str, Any] = {"machine": machine or {}, "parts": {}, "goals": [], "failed": 0}
    workers: dict[str, Worker] = {}

    def write() -> None:
        results["parts"] = {n: workers[n].results for n in parts if n in workers}
        judge(results)
        rows = [row for part in results["parts"].values() for row in part]
        results["failed"] = sum(not row["ok"] for row in rows)
        results["seconds"] = round(time.monotonic() - began, 1)
        for name, text in (("results.json", json.dumps(results, indent=1) + "\n"),
                           ("report.md", report(results))):  # fmt: skip
            temporary = out / f"{name}.tmp"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(out / name)

    def work(waiting: list[str], limit: float, at_once: int) -> None:
        running: list[Worker] = []
        while waiting or running:
            late = time.monotonic() - began > limit
            while waiting and (late or len(running) < at_once):
                name = waiting.pop(0)
                workers[name] = Worker(name, parts[name], out, device)
                running.append(workers[name])
                if not late:
                    workers[name].start()
            changed = False
            for worker in list(running):
                if late:
                    worker.stop(f"{limit:.0f} s were over")
                else:
                    changed |= worker.poll()
                if worker.over:
                    running.remove(worker)
                    worker.close()
                    good = sum(row["ok"] for row in worker.results)
                    tell(f"{worker.name}: {good} of {len(worker.results)}")
                    changed = True
            if changed:
                write()
            time.sleep(POLL)

    timed = [n for n in parts if parts[n].timed]
    work([n for n in parts if not parts[n].timed], FOR_CHECKS if timed else BUDGET, jobs)
    work(timed, BUDGET, 1)
    write()
    return results


if __name__ == "__main__":
    home, lines, skip, kind = sys.argv[1:]
    if kind == "cuda":
        os.environ.pop("TRITON_INTERPRET", None)
    work_off(Part(home), Path(lines), int(skip), torch.device(kind))
