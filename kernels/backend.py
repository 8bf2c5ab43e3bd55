"""The one place where a backend for the recurrent operations is chosen."""

import torch

BACKENDS = ("auto", "torch", "reference")


def resolve_backend(backend: str, device: torch.device | str) -> str:
    """Name of the backend that will run on `device`.

    `torch` is PyTorch's own LSTM (oneDNN on a CPU, cuDNN on a GPU); `reference` is the
    plain equations, one step at a time, on any device and dtype.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    return "torch" if backend == "auto" else backend
