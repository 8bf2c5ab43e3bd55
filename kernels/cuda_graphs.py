"""How a CUDA graph is captured."""

from collections.abc import Callable
from typing import Any

import torch


def record(run: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of `run`, and what it returned: memory that every replay writes anew.

    It runs twice first: compiling and self-checks are not for a capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on using CUDA: a backward pass runs in one of its own.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run()
    return graph, out
