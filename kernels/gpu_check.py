"""The whole check of a GPU: parts in processes of their own, results as JSON.

A kernel that fails may leave the device unusable for its process, and one that hangs never
returns: each part is therefore a process with a time limit, and its results are kept as they
come, line by line. Together the limits stay under 8 minutes.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from fusion_model.kernels import gpu_cases, gpu_timing, triton_launch

Result = dict[str, Any]
Part = Callable[[torch.device], Iterator[Result]]


def _hangs(device: torch.device) -> Iterator[Result]:
    """Launches that could hang must raise, or end; this part's time limit is the proof."""
    from fusion_model.kernels.triton_floor import empty_steps, wait_in_vain
    from fusion_model.kernels.triton_launch import LaunchRefused, chip_of, launch_spinning

    sms = chip_of(device).sms
    count, out = torch.zeros(2, 1, dtype=torch.int32, device=device)
    wait_in_vain[(1,)](count, out, 1, LIMIT=1000)
    torch.cuda.synchronize()
    yield {"case": "a debug build gives up waiting", "ok": int(out) == 1}
    try:
        launch_spinning(empty_steps, (sms + 1, 1), (count, 2), device, LIMIT=0)
        refused = False
    except LaunchRefused:
        refused = True
    yield {"case": "a grid larger than the chip is refused by us", "ok": refused}
    many = 64 * sms
    try:
        empty_steps[(many,)](count, 2, LIMIT=10_000, launch_cooperative_grid=True, num_warps=8)
        torch.cuda.synchronize()
        refused = False
    except Exception:  # whatever class the driver's refusal has
        refused = True
    yield {"case": f"{many} programs are refused by the driver", "ok": refused}


def _timing(run: Callable[[], Iterator[Result]]) -> Part:
    return lambda _: run()


PARTS: dict[str, tuple[Part, float]] = {  # seconds: together 475
    "hangs": (_hangs, 20),
    "surprisal": (lambda device: gpu_cases.check("surprisal", device), 35),
    "prefix": (lambda device: gpu_cases.check("prefix", device), 75),
    "sequence": (lambda device: gpu_cases.check("sequence", device), 100),
    "repeats": (gpu_cases.repeat, 40),
    "graphs": (gpu_cases.replay, 30),
    "floors": (_timing(gpu_timing.floors), 20),
    "time tokens": (_timing(gpu_timing.decoding), 35),
    "time sequences": (_timing(gpu_timing.sequences), 60),
    "time prefixes": (_timing(gpu_timing.prefixes), 35),
    "time surprisal": (_timing(gpu_timing.surprisals), 25),
}


def run_part(name: str, out: Path, device: torch.device) -> None:
    """One part in this process: a line of JSON a result, written at once."""
    with open(out, "a", encoding="utf-8") as file:
        try:
            for result in PARTS[name][0](device):
                file.write(json.dumps(result) + "\n")
                file.flush()
        except Exception as error:
            failed = {"case": name, "ok": False, "error": f"{type(error).__name__}: {error}"}
            file.write(json.dumps(failed) + "\n")
        for kernel, agreed in triton_launch.checked.items():  # else PyTorch's time passes for ours
            if not agreed:
                failed = {"case": " ".join(map(str, kernel)), "ok": False, "error": "fell back"}
                file.write(json.dumps(failed) + "\n")


def run_parts(names: list[str], out: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """All parts, each in its process; `results.json` in `out` is whole after every part."""
    results: dict[str, Any] = {"machine": machine(), "parts": {}, "failed": 0}
    for name in names:
        limit = PARTS[name][1]
        lines = out / f"{name.replace(' ', '-')}.jsonl"
        lines.unlink(missing_ok=True)
        command = [sys.executable, "-m", "fusion_model.kernels.gpu_check", name, str(lines)]
        failure = None
        try:
            done = subprocess.run(command, timeout=limit, capture_output=True, text=True)
            if done.returncode:
                failure = f"exit {done.returncode}: {done.stderr[-500:]}"
        except subprocess.TimeoutExpired:
            failure = f"not done within {limit} s"
        written = lines.read_text().split("\n")[:-1] if lines.exists() else []  # whole lines
        found = [json.loads(line) for line in written]
        if failure is not None:
            found.append({"case": name, "ok": False, "error": failure})
        lines.unlink(missing_ok=True)
        results["parts"][name] = found
        bad = sum(not r["ok"] for r in found)
        results["failed"] += bad
        temporary = out / "results.json.tmp"
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        temporary.replace(out / "results.json")
        tell(f"{name}: {len(found) - bad} of {len(found)}")
    return results


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    import triton

    gpu = torch.cuda.is_available()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name() if gpu else None,
        "driver": _first_line(query),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _first_line(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _first_line(command: list[str]) -> str | None:
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.splitlines()[0].strip() if out.strip() else None


def rows_of(results: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(part, case, verdict, figures) of every result."""
    for part, found in results["parts"].items():
        for r in found:
            figures = []
            if "of_budget" in r:
                figures.append(f"error {r['of_budget']:.2f} of the budget, {r['plan']}")
            if "us" in r:
                figures.append(f"{r['us']:.2f} us")
            if "us" in r and "steps" in r:
                figures.append(f"{r['us'] / r['steps']:.2f} us a step")
            if "ratio" in r:
                goal = f" (goal {r['goal']})" if r.get("goal") else ""
                figures.append(f"{r['ratio']:.2f}x{goal} of {r['baseline_us']:.2f} us")
            figures += [f"{r[k]:.0f} {unit}" for k, unit in UNITS.items() if k in r]
            figures += [str(r[k]) for k in ("error", "us_error", "baseline_us_error") if k in r]
            figures += r.get("fallback", [])
            yield part, r["case"], "ok" if r["ok"] else "FAILED", ", ".join(figures)


UNITS = {"tflops": "TFLOP/s", "gb_per_s": "GB/s"}

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    run_part(sys.argv[1], Path(sys.argv[2]), torch.device("cuda"))
