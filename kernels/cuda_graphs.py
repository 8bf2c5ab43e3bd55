"""CUDA graphs: how one is captured, and layers whose steps are launches, replayed as one.

A layer whose steps are launches of their own costs the host a launch a step. A shape that comes a
second time is therefore captured, on memory of its own: from then on its inputs are copied there,
the graph is replayed, and its outputs are copied back.

Notation: N rows at the first step, T steps.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fusion_model.kernels.triton.guards import attempt
from torch import Tensor

STEPS = 16  # fewer launches than this are no more than the copies
ROWS = 1024  # beyond, a step is thought to take longer than its launch by the host
BYTES = 1 << 28  # beyond, copies cost more than launches
MOST = 8  # graphs kept; the one not used for the longest time goes
SEEN = 1024  # shapes remembered


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


def worth(rows: int, steps: int, size: int) -> bool:
    """Whether a layer is better replayed: a pure function, of estimates."""
    return steps >= STEPS and rows <= ROWS and size <= BYTES


def _tensors(args: Any) -> dict[str, Tensor]:
    return {n: t for n, t in args._asdict().items() if isinstance(t, Tensor)}


def _copied(args: Any) -> dict[str, Tensor]:
    """Tensors that a graph has memory of its own for."""
    names = {*_tensors(args.given()), *args.written}
    return {n: t for n, t in _tensors(args).items() if n in names}


class StepGraphs:
    """Graphs by shape; a named tuple of tensors and settings is what a graph is of.

    It says by `given()` which of its tensors are read, and by `written` which are written. What is
    neither is read where it lies: it outlives many calls.

    Attributes:
        replays: how often a graph stood in for launches.
    """

    def __init__(self, capture: Callable[[Callable[[], Any]], tuple[Any, Any]] = record) -> None:
        self._capture = capture
        self._seen: OrderedDict[Any, None] = OrderedDict()
        self._graphs: OrderedDict[Any, tuple[Any, Any] | None] = OrderedDict()
        self._lock = threading.RLock()
        self.replays = 0

    def run(self, name: str, function: Callable[[Any], None], args: Any) -> None:
        """`function(args)`, by a graph from the second time on; `name` is the kernel's."""
        tensors, copied = _tensors(args), _copied(args)
        shapes = ((n, t.shape, t.dtype) for n, t in tensors.items())
        places = (t.data_ptr() for n, t in tensors.items() if n not in copied)
        settings = (v for n, v in args._asdict().items() if n not in tensors)
        key = (name, self._where(args), *shapes, *places, *settings)
        with self._lock:
            found = self._graph(key, function, args, copied)
            if found is None:
                return function(args)
            static, graph = found
            for n, t in _tensors(args.given()).items():
                getattr(static, n)[: len(t)].copy_(t)
            graph.replay()
            for n in args.written:
                if n in tensors:
                    tensors[n].copy_(getattr(static, n))
            self.replays += 1

    def _where(self, args: Any) -> Any:
        device = args.w.device
        if device.type != "cuda":
            return str(device)
        return str(device), torch.cuda.current_stream(device).cuda_stream

    def _graph(
        self, key: Any, function: Callable[[Any], None], args: Any, copied: Mapping[str, Tensor]
    ) -> tuple[Any, Any] | None:
        """Memory and graph of this key, captured now if it comes a second time; else None."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > SEEN:
                self._seen.popitem(last=False)
            return None
        del self._seen[key]

        def capture() -> tuple[Any, Any]:
            with torch.inference_mode(False):  # such tensors could not be written outside of it
                static = args._replace(**{n: t.clone() for n, t in copied.items()})
                return static, self._capture(lambda: function(static))[0]

        failure = f"{key[0]}: no CUDA graph of its steps, they are launched one by one"
        self._graphs[key] = attempt(capture, failure)  # a driver may refuse
        if len(self._graphs) > MOST:
            self._graphs.popitem(last=False)
        return self._graphs[key]


graphs = StepGraphs()


def run_steps(name: str, function: Callable[[Any], None], args: Any) -> None:
    """`StepGraphs.run` on a GPU, where it is worth it and nobody is capturing; else the call."""
    size = sum(t.nbytes for t in _copied(args).values())
    on_gpu = args.w.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    if on_gpu and worth(args.rows.active(0), args.rows.steps, size):
        return graphs.run(name, function, args)
    return function(args)
