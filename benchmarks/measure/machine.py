"""What a result was measured on. An exported model is described where PyTorch is not."""

import datetime
import importlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "onnxruntime", "onnxruntime-gpu", "triton", "numpy")
HERE = Path(__file__).resolve().parents[1]


def checkout() -> Path | None:
    """The clone that this package runs from, if it runs from one."""
    root = HERE.parent
    return root if (root / ".git").exists() and (root / "fusion_model").is_dir() else None


def commit() -> str | None:
    """Of the clone, with `+` where files differ from it; None outside one."""
    root = checkout()
    if root is None:
        return None
    git = "git", "-C", str(root)
    head = _output(*git, "rev-parse", "--short=12", "HEAD")
    where = "--", ".", ":!benchmarks/results"
    return head and head + ("+" if _output(*git, "status", "--porcelain", "-uno", *where) else "")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def optional(module: str) -> Any:
    """The module; None where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        return None


def cpu_name() -> str:
    """As the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def describe(device: str, threads: int | None = None) -> dict[str, Any]:
    """Device, clocks, versions, commit and date, for every run's first line.

    Args:
        threads: those used (default: PyTorch's).
    """
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    found: dict[str, Any] = {
        "device": device.partition(":")[0],
        "name": cpu_name(),
        "cpu": cpu_name(),
        "threads": threads,
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if psutil := optional("psutil"):
        frequency = psutil.cpu_freq()
        found["cores"] = psutil.cpu_count(logical=False)
        found["cpu_mhz"] = round(frequency.current) if frequency else None
        found["memory_gb"] = round(psutil.virtual_memory().total / 1e9, 1)
    return found | (_gpu(device) if found["device"] == "cuda" else {})


def _gpu(device: str) -> dict[str, Any]:
    """What the driver says, and with PyTorch what that says."""
    smi = "nvidia-smi", "-i", device.partition(":")[2] or "0", "--format=csv,noheader"
    found: dict[str, Any] = {
        "name": _output(*smi, "--query-gpu=name"),
        "driver": _output(*smi, "--query-gpu=driver_version"),
    }
    torch = optional("torch")
    if torch is None:
        return found
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "gpu_mhz": _gpu_clock(torch, device),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def where(machine: dict[str, Any], library: str = "torch") -> str:
    """Device, version of the library that ran, and date in one line."""
    device, versions = machine["name"], machine["versions"]
    if machine["device"] == "cpu":
        plural = "" if machine["threads"] == 1 else "s"
        device += f", {machine['threads']} thread{plural}"
    version = next((v for name, v in versions.items() if name.startswith(library)), None)
    return f"{device}, {library} {version}, {machine['date'][:10]}"


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _gpu_clock(torch: Any, device: str) -> int | None:
    try:
        return int(torch.cuda.clock_rate(torch.device(device)))
    except Exception:  # NVML's Python package is missing, or it refuses: it has errors of its own
        return None
