"""ONNX Runtime sessions: where they run, with how many threads, and what they refuse.

Nothing here needs PyTorch.
"""

import os
from pathlib import Path
from typing import Any

from fusion_model.export.manifest import OLDEST_RUNTIME

from fusion_model import progress
from fusion_model.errors import ExportError, first_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def runtime() -> Any:
    """The module `onnxruntime`.

    Raises:
        ExportError: it is not installed, or too old.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(
            f"ONNX Runtime cannot be imported ({error}): pip install onnxruntime, or "
            "onnxruntime-gpu for an NVIDIA GPU (one of the two, never both)"
        ) from error
    check_version(onnxruntime.__version__)
    return onnxruntime


def check_version(version: str, oldest: str = OLDEST_RUNTIME) -> None:
    """Raise `ExportError` for an ONNX Runtime older than `oldest`."""
    found, needed = ([int(part) for part in v.split(".")[:2]] for v in (version, oldest))
    if found < needed:
        raise ExportError(
            f"ONNX Runtime {version} is too old: {oldest} or later is needed "
            "(pip install --upgrade onnxruntime)"
        )


def choose_device(device: str, precision: str, path: Path) -> str:
    """`cpu` or `cuda`. For `auto` CUDA where ONNX Runtime has it, it starts, and the graph at
    `path` runs there, which int8 does not; a note says why not.

    Raises:
        ExportError: unknown, or not there; CUDA for int8.
    """
    available = runtime().get_available_providers()
    if device == "auto":
        if PROVIDERS["cuda"] not in available:
            return "cpu"
        try:
            open_session(path, choose_device("cuda", precision, path), 1)
        except ExportError as error:
            progress.note(f"running on the CPU: {error}")
            return "cpu"
        return "cuda"
    if device not in PROVIDERS:
        raise ExportError(
            f"unknown device {device!r} for ONNX Runtime: choose one of auto, "
            f"{', '.join(PROVIDERS)}"
        )
    if PROVIDERS[device] not in available:
        raise ExportError(
            f"{PROVIDERS[device]} is not in this ONNX Runtime, which has "
            f"{', '.join(available)}: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    if (device, precision) == ("cuda", "int8"):
        raise ExportError("int8 products have no CUDA kernels: use device cpu, or export anew")
    return device


def default_threads() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def open_session(path: Path, device: str, threads: int, profile: Path | None = None) -> Any:
    """An `onnxruntime.InferenceSession` that runs where it was asked to.

    Args:
        path: the graph.
        device: `cpu` or `cuda`.
        threads: of one operator; operators run one after the other.
        profile: how the name of a file with each node's time begins, which `end_profiling` names.

    Raises:
        ExportError: the graph cannot be loaded; CUDA was asked for and could not be started.
    """
    ort, provider = runtime(), PROVIDERS[device]
    cores = os.cpu_count() or 1
    if not 1 <= threads <= cores:
        raise ExportError(f"threads must be from 1 to {cores}, the cores here, not {threads}")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    # Else this session's threads go on looking for work and take cores from the next one's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Errors; of CUDA warnings, too, which tell of nodes that have no kernel there.
    options.log_severity_level = 3 if device == "cpu" else 2
    providers: list[Any] = [provider]
    if device == "cuda":
        ort.preload_dlls()  # those of pip's CUDA packages, or of PyTorch where it is imported
        # TensorFloat-32 keeps ten bits: float32 would not be what was verified.
        providers = [(provider, {"use_tf32": "0"}), PROVIDERS["cpu"]]
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime raises kinds of its own, none of them public
        raise ExportError(f"ONNX Runtime cannot load {path}: {first_line(error)}") from error
    if provider not in session.get_providers():
        raise ExportError(
            f"{provider} could not be started (its CUDA or cuDNN libraries are missing or do not "
            "fit): install those that this ONNX Runtime was built for, or use device cpu"
        )
    return session
