"""CUDA graphs: how one is captured, and layers whose steps are launches, replayed as one.

A layer whose steps are launches of their own costs the host a launch a step. A shape that comes a
second time is therefore captured, on memory of its own: from then on its inputs are copied there,
the graph is replayed, and its outputs are copied back.

Notation: N rows at the first step, T steps.
"""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

STEPS = 16  # fewer launches than this are no more than the copies
ROWS = 1024  # beyond, a step is thought to take longer than its launch by the host
BYTES = 1 << 28  # beyond, copies cost more than launches
MOST = 8  # graphs kept; the one not used for the longest time goes
SEEN = 1024  # shapes remembered


def record(run: Callable[[], Any], warm: int = 2) -> tuple[Any, Any]:
    """A CUDA graph of `run`, and what it returned: memory that every replay writes anew.

    It runs `warm` times first: compiling and self-checks are not for a capture.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
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


def _replay_of(run: Callable[[], Any]) -> Callable[[], None]:
    replay: Callable[[], None] = record(run, warm=1)[0].replay
    return replay


class StepGraphs:
    """Graphs by shape; a named tuple of tensors and settings is what a graph is of.

    Attributes:
        replays: how often a graph stood in for launches.
    """

    def __init__(self, capture: Callable[[Callable[[], Any]], Callable[[], None]] = _replay_of):
        self._capture = capture
        self._seen: OrderedDict[Any, None] = OrderedDict()
        self._graphs: OrderedDict[Any, tuple[Any, Callable[[], None]] | None] = OrderedDict()
        self._lock = threading.RLock()
        self.replays = 0

    def run(
        self,
        name: str,
        function: Callable[..., None],
        args: Any,
        given: Mapping[str, int | None],
        written: tuple[str, ...],
        fixed: tuple[str, ...] = (),
    ) -> None:
        """`function(*args)`; by a graph from the second time on.

        Args:
            name: of the kernel.
            args: a named tuple, whose tensors the function reads and writes.
            given: what it reads; so many of a tensor's first rows, None: all.
            written: what it writes.
            fixed: read where they lie, without a copy: they outlive many calls.
        """
        tensors = {n: t for n, t in args._asdict().items() if isinstance(t, Tensor)}
        shapes = ((n, t.shape, t.dtype) for n, t in tensors.items())
        places = (tensors[n].data_ptr() for n in fixed)
        settings = (v for n, v in args._asdict().items() if n not in tensors)
        key = (name, self._where(args), *shapes, *places, *settings)
        with self._lock:
            graph = self._graph(key, function, args, tensors, fixed)
            if graph is None:
                return function(*args)
            static, replay = graph
            for n, rows in given.items():
                if n in tensors and n not in fixed:
                    getattr(static, n)[:rows].copy_(tensors[n][:rows])
            replay()
            for n in written:
                if n in tensors:
                    tensors[n].copy_(getattr(static, n))
            self.replays += 1

    def _where(self, args: Any) -> Any:
        device = args.w.device
        if device.type != "cuda":
            return str(device)
        return str(device), torch.cuda.current_stream(device).cuda_stream

    def _graph(
        self,
        key: Any,
        function: Callable[..., None],
        args: Any,
        tensors: Mapping[str, Tensor],
        fixed: tuple[str, ...],
    ) -> tuple[Any, Callable[[], None]] | None:
        """The graph of this key, captured now if it comes a second time; else None."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        if key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > SEEN:
                self._seen.popitem(last=False)
            return None
        found = None
        try:
            with torch.inference_mode(False):  # such tensors could not be written outside of it
                copies = {n: torch.empty_like(t) for n, t in tensors.items() if n not in fixed}
                for n, t in copies.items():
                    t.copy_(tensors[n])
                static = args._replace(**copies)
                found = static, self._capture(lambda: function(*static))
        except Exception as error:  # a driver may refuse: launches do the same, only later
            warnings.warn(
                f"{key[0]}: no CUDA graph of its steps, they are launched one by one: "
                f"{type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=3,
            )
        self._graphs[key] = found
        if len(self._graphs) > MOST:
            self._graphs.popitem(last=False)
        return found


graphs = StepGraphs()


def run_steps(
    name: str,
    function: Callable[..., None],
    args: Any,
    given: Mapping[str, int | None],
    written: tuple[str, ...],
    fixed: tuple[str, ...] = (),
) -> None:
    """`StepGraphs.run` on a GPU, where it is worth it and nobody is capturing; else the call."""
    rows, held = args.rows, [t for n, t in args._asdict().items() if isinstance(t, Tensor)]
    size = sum(t.nbytes for t in held if not any(t is getattr(args, n) for n in fixed))
    on_gpu = args.w.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    if on_gpu and worth(rows.active(0), rows.steps, size):
        return graphs.run(name, function, args, given, written, fixed)
    return function(*args)
