"""The one place where a backend for the operations is chosen."""

import json
from pathlib import Path

import torch
from fusion_model.kernels.triton.configs import DTYPES, HAS_TRITON, chip_of, interpreting

BACKENDS = ("auto", "torch", "cudnn", "triton", "reference")
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MEASURED: dict[str, float] = json.loads(Path(__file__).with_name("measured.json").read_text())
"""`measured_as` -> how many times as fast as PyTorch the kernels were where they did worst: the
`measured` of a `results.json` that `fusion-lm gpu-check` wrote. Empty as long as none has been."""


def measured_as(capability: int, operation: str, kind: str, training: bool) -> str:
    """As what `MEASURED` knows it; kind is one of `NAMES`' names."""
    return f"sm_{capability} {operation} {kind}" + " training" * training


def choose(
    operation: str,
    device: str,
    capability: int,
    dtype: torch.dtype | None,
    steps: int | None,
    triton: bool,
    training: bool = False,
) -> str:
    """What `auto` means: a pure function of what is known before the call.

    On a CPU `torch`, but for a single step of a sequence, where PyTorch's LSTM takes about twice
    as long as the equations. On a GPU from Ampere on, in 16 bits, what `MEASURED` says is faster;
    where it says nothing `triton` for prefixes and surprisal, where it does less work than PyTorch
    by construction, and for decoding, where the host launches one graph for many tokens, but not
    for sequences.

    Args:
        operation: `sequence`, `prefix`, `surprisal` or `decode`.
        device: type of the device.
        capability: 10 * major + minor of a GPU's compute capability, 0 for a CPU.
        dtype: of the products, where it is known.
        steps: length of the sequence, where it is known.
        triton: whether triton is installed.
        training: whether gradients may be wanted.
    """
    if device == "cpu":
        return "reference" if operation == "sequence" and steps == 1 else "torch"
    if not triton or device != "cuda" or capability < 80 or dtype not in NAMES:
        return "torch"
    ratio = MEASURED.get(measured_as(capability, operation, NAMES[dtype], training))
    faster = operation != "sequence" if ratio is None else ratio >= 1
    return "triton" if faster else "torch"


def obstacle(
    backend: str, device: str, capability: int, dtype: torch.dtype | None, triton: bool
) -> str | None:
    """Why a backend cannot run there, or None."""
    if backend == "cudnn" and device != "cuda":
        return f"it needs a CUDA device, and the tensors are on {device}"
    if backend != "triton":
        return None
    if not triton:
        return "triton is not installed (pip install triton; Linux on x86-64)"
    if device != "cuda" and not (device == "cpu" and interpreting()):
        return f"it needs a CUDA device, and the tensors are on {device}"
    if device == "cuda" and capability < 80:
        return f"it needs compute capability 8.0, and the device has {capability / 10}"
    if dtype is not None and dtype not in DTYPES:
        return f"it computes in bfloat16, float16 and float32, not in {dtype}"
    return None


def resolve_backend(
    backend: str,
    device: torch.device | str,
    steps: int | None = None,
    *,
    operation: str = "sequence",
    dtype: torch.dtype | None = None,
) -> str:
    """Name of the backend that will run.

    `torch` is PyTorch's own (oneDNN on a CPU, cuDNN on a GPU), `cudnn` the same and only on a GPU,
    `triton` the kernels of this package, `reference` the plain equations, one step at a time, on
    any device and dtype. For `auto` see `choose`.

    Args:
        backend: one of `BACKENDS`.
        device: where the tensors are.
        steps: length of the sequence, where it is known.
        operation: as in `choose`.
        dtype: of the products, where it is known.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`, or cannot run there; it says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    device = torch.device(device)
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    capability = chip_of(device).capability if on_gpu else 0
    if backend == "auto":
        known = operation, device.type, capability, dtype, steps, HAS_TRITON
        return choose(*known, training=torch.is_grad_enabled())
    if reason := obstacle(backend, device.type, capability, dtype, HAS_TRITON):
        raise ValueError(f"backend {backend!r} cannot run here: {reason}")
    return backend


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Of products: that of autocast where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
