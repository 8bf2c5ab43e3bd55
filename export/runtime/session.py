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
# Arithmetic on shapes: ONNX Runtime keeps these few integers on the CPU on purpose.
SHAPE_OPERATORS = (
    *("Shape", "Size", "Range", "Slice", "Concat", "Gather", "Squeeze", "Unsqueeze", "Cast"),
    *("Add", "Sub", "Mul", "Div", "Reshape", "Expand", "Identity", "Constant"),
    *("ConstantOfShape", "Max", "Min", "Equal", "Where", "MemcpyToHost", "MemcpyFromHost"),
)


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
    `path` runs there; the CPU for int8, whose products have no CUDA kernels. A note says why not.

    Raises:
        ExportError: unknown, or not there.
    """
    available = runtime().get_available_providers()
    if device == "auto":
        if PROVIDERS["cuda"] not in available:
            return "cpu"
        if precision == "int8":
            progress.note("int8 runs on the CPU: its products have no CUDA kernels")
            return "cpu"
        try:
            open_session(path, "cuda", 1)
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
        ExportError: the graph cannot be loaded; CUDA was asked for and could not be started, or
            some of the graph's nodes fell to the CPU.
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
    options.log_severity_level = 3  # errors; what falls to the CPU is refused below
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers: list[Any] = [provider]
    if device == "cuda":
        ort.preload_dlls()  # those of pip's CUDA packages, or of PyTorch where it is imported
        # TensorFloat-32 keeps ten bits: float32 would not be what was verified.
        providers = [(provider, {"use_tf32": "0"}), PROVIDERS["cpu"]]
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime raises kinds of its own, none of them public
        raise ExportError(f"ONNX Runtime cannot load {path}: {first_line(error)}") from error
    if device != "cpu":
        if provider not in session.get_providers():
            raise ExportError(
                f"{provider} could not be started (its CUDA or cuDNN libraries are missing or do "
                "not fit): install those that this ONNX Runtime was built for, or use device cpu"
            )
        check_placement(session, provider, path.name)
    return session


def check_placement(session: Any, provider: str, name: str) -> None:
    """Refuse a session of which nodes run elsewhere than on `provider`.

    Arithmetic on shapes may: it belongs on the CPU.

    Raises:
        ExportError: it names the nodes; or this ONNX Runtime cannot tell.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise ExportError(
            "this ONNX Runtime is too old to tell which nodes run on the GPU: upgrade "
            "onnxruntime-gpu, or use device cpu"
        )
    nodes = [
        node
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
        if node.op_type not in SHAPE_OPERATORS
    ]
    nodes.sort(key=lambda node: "LSTM" not in node.op_type and "MatMul" not in node.op_type)
    fallen = [f"{node.op_type} {node.name!r}" for node in nodes]  # the costly ones come first
    if fallen:
        shown = ", ".join(fallen[:5]) + (f" and {len(fallen) - 5} more" if len(fallen) > 5 else "")
        raise ExportError(
            f"{name}: {provider} has no kernel for {shown}, which would run on the CPU: export "
            "with --precision fp32 or fp16, or use device cpu"
        )
