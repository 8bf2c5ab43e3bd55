"""How a CUDA graph is captured."""

import threading
from collections.abc import Callable
from typing import Any

import torch

in_use = threading.RLock()
"""Held while what is kept for graphs is used: threads share that memory, and none may capture while
another one does."""
_streams: dict[int, Any] = {}  # one a device: cuBLAS keeps a workspace for each


def record(run: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of `run`, and what it returned: memory that every replay writes anew.

    It runs twice first: compiling and self-checks are not for a capture.
    """
    device = torch.cuda.current_device()
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    stream = _streams[device]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on using CUDA: a backward pass runs in one of its own.
    # PyTorch's own stream for captures is on the device of the first one.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        out = run()
    return graph, out
