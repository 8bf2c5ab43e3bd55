"""Passes of equal shapes on a GPU, captured once and replayed with a single launch.

Small passes, such as a stream's step, cost a GPU more in launches than in work. A pass that comes
back with the same shapes is captured as a CUDA graph: it reads what it read then from the same
memory, into which the new values are copied first. The first replays are held against the plain
pass; where they differ, or capture fails, all passes are plain again, with a warning.
"""

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FEW_TOKENS = 512  # a pass over more has work enough for its launches
OFTEN = 3  # passes of a shape before it is captured
CHECKED = 2  # replays of each graph: the capture's own values, and the first new ones
MOST = 32  # graphs

Compute = Callable[[], list[Tensor]]
Capture = Callable[[Compute], tuple[Callable[[], object], list[Tensor]]]
"""Gives what replays the pass, and the tensors that it then writes."""


def cuda_capture(compute: Compute) -> tuple[Callable[[], object], list[Tensor]]:
    """A CUDA graph of a pass that only works on tensors of the current device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries allocate on their first call, outside the graph
        compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = compute()
    return graph.replay, outputs


@dataclass
class _Held:
    inputs: list[Tensor]
    replay: Callable[[], object]
    outputs: list[Tensor]
    checked: int = 0


class Graphs:
    """Graphs of the shapes that come often, the latest used kept.

    Args:
        capture: how a pass is captured.
        most: graphs kept.
    """

    def __init__(self, capture: Capture = cuda_capture, most: int = MOST) -> None:
        self._capture, self._most = capture, most
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._held: OrderedDict[tuple[object, ...], _Held] = OrderedDict()
        self._works = True

    def __len__(self) -> int:
        return len(self._held)

    def run(self, name: object, inputs: Sequence[Tensor], compute: Compute) -> list[Tensor]:
        """What `compute` gives, by replay where its shapes were captured.

        Args:
            name: of the pass; passes of one name and equal shapes do the same.
            inputs: all tensors that differ from pass to pass, none a view of another; `compute`
                reads them, and what it writes elsewhere depends on them alone.
        """
        if not self._works:
            return compute()
        key = (name, *((*t.shape, t.dtype) for t in inputs))
        held = self._held.get(key)
        if held is None:
            found = compute()
            self._seen[key] += 1
            if self._seen[key] >= OFTEN:
                self._take(key, list(inputs), compute, found)
            if len(self._seen) > 100 * self._most:
                self._seen.clear()
            return found
        self._held.move_to_end(key)
        for mine, new in zip(held.inputs, inputs, strict=True):
            mine.copy_(new)
        held.replay()
        if held.checked < CHECKED and not self._right(held, compute()):
            return compute()
        return [out.clone() for out in held.outputs]

    def _take(
        self,
        key: tuple[object, ...],
        inputs: list[Tensor],
        compute: Compute,
        found: list[Tensor],
    ) -> None:
        try:
            replay, outputs = self._capture(compute)
            replay()
        except RuntimeError as error:
            self._give_up(f"capture failed ({error})")
            return
        held = _Held(inputs, replay, outputs)
        if self._right(held, found):
            self._held[key] = held
            while len(self._held) > self._most:
                self._held.popitem(last=False)

    def _right(self, held: _Held, expected: list[Tensor]) -> bool:
        held.checked += 1
        for ours, theirs in zip(held.outputs, expected, strict=True):
            tolerance = 1e-5 if theirs.dtype == torch.float32 else 2**-6
            scale = float(theirs.abs().max().clamp(min=1)) if theirs.numel() else 1.0
            if not bool(((ours - theirs).abs() <= tolerance * scale).all()):
                self._give_up("a replay differs from the plain pass")
                return False
        return True

    def _give_up(self, why: str) -> None:
        self._works = False
        self._held.clear()
        warnings.warn(f"CUDA graphs of the encoder are not used: {why}", stacklevel=2)
