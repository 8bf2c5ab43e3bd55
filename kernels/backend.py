"""The one place where a backend for the recurrent operations is chosen."""

import torch

BACKENDS = ("auto", "torch", "reference")


def resolve_backend(backend: str, device: torch.device | str, steps: int | None = None) -> str:
    """Name of the backend that will run.

    `torch` is PyTorch's own LSTM (oneDNN on a CPU, cuDNN on a GPU); `reference` is the
    plain equations, one step at a time, on any device and dtype. `auto` is `torch`, but on a CPU
    for a single step, where PyTorch's takes about twice as long as the equations.

    Args:
        backend: one of `BACKENDS`.
        device: where the tensors are.
        steps: length of the sequence, where it is known.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return "reference" if steps == 1 and torch.device(device).type == "cpu" else "torch"
    return backend
