"""Times on the GPU at hand: the kernels, cuDNN beside them, and what the chip can do at best.

H = 768, D = 512, V = 8192 throughout, the published sizes. Times are medians of runs between CUDA
events, after a warm-up; both sides of a ratio run in the same process, one after the other.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from fusion_model.kernels.prefix_lstm import prefix_lstm
from fusion_model.kernels.surprisal import target_log_probs
from torch import Tensor, nn

Result = dict[str, Any]
DEVICE = "cuda"
D, H, V = 512, 768, 8192
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def microseconds(run: Callable[[], Any], rounds: int = 15) -> float:
    """Median time of one call; calls are batched to a few milliseconds a round."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()

    def once(calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1000 / calls

    calls = max(1, min(200, int(3000 / max(once(1), 1.0))))
    return sorted(once(calls) for _ in range(rounds))[rounds // 2]


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """The same work as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def versus(name: str, ours: Callable[[], Any], theirs: Callable[[], Any], **more: Any) -> Result:
    """A row with both times and their ratio; what fails on one side leaves that side out."""
    row: Result = {"case": name, "ok": True, **more}
    for side, run in (("us", ours), ("baseline_us", theirs)):
        try:
            row[side] = microseconds(run)
        except Exception as error:
            row["ok"] = False
            row[f"{side}_error"] = f"{type(error).__name__}: {error}"
    if row["ok"]:
        row["ratio"] = row["baseline_us"] / row["us"]
    return row


def _with_graph(name: str, ours: Any, theirs: Any, **more: Any) -> Iterator[Result]:
    yield versus(f"{name}, eager", ours, theirs, **more)
    try:
        pair = graphed(ours), graphed(theirs)
    except Exception as error:
        yield {"case": f"{name}, graph", "ok": False, "error": f"{type(error).__name__}: {error}"}
        return
    yield versus(f"{name}, graph", *pair, **more)


def _lstm(dtype: torch.dtype) -> nn.LSTM:
    return nn.LSTM(D, H, batch_first=True).to(DEVICE, dtype)


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def sequences(steps: int = 256) -> Iterator[Result]:
    """Sequences: inference from a table of input gates, and training steps, against nn.LSTM."""
    for dtype in NAMES:
        for batch in (1, 16, 64, 256):
            yield from _sequence(dtype, batch, steps)


def _sequence(dtype: torch.dtype, batch: int, steps: int) -> Iterator[Result]:
    from fusion_model.kernels import triton_lstm

    module, embedding, tables = _lstm(dtype), _random(dtype, V, D), triton_lstm.GateTable()
    weights = module.all_weights
    ids = torch.randint(V, (batch, steps), device=DEVICE)
    zeros = torch.zeros(batch, 1, H, device=DEVICE, dtype=dtype)
    inner = (zeros.transpose(0, 1), zeros.transpose(0, 1))

    def ours() -> Any:
        return triton_lstm.lstm_tokens(ids, embedding, (zeros, zeros), weights, tables)

    @torch.no_grad()
    def theirs() -> Any:
        return module(F.embedding(ids, embedding), inner)

    name = f"{NAMES[dtype]} B{batch} T{steps}"
    goal = 1.3 if batch == 256 else 2.0
    yield from _with_graph(f"sequence {name}", ours, theirs, steps=steps, goal=goal)

    x, upstream = F.embedding(ids, embedding), _random(dtype, batch, steps, H)

    def train() -> Any:
        out, _ = triton_lstm.lstm_sequence(x, (zeros, zeros), weights)
        return torch.autograd.grad(out, weights[0], upstream)

    def train_theirs() -> Any:
        return torch.autograd.grad(module(x, inner)[0], weights[0], upstream)

    yield versus(f"training step {name}", train, train_theirs, steps=steps, goal=1.3)


def decoding() -> Iterator[Result]:
    """A token, greedy, as one CUDA graph on both sides."""
    for dtype in NAMES:
        for batch in (1, 16):
            with torch.no_grad():
                yield _token(dtype, batch)


def _token(dtype: torch.dtype, batch: int) -> Result:
    from fusion_model.kernels import triton_token

    module, embedding = _lstm(dtype), _random(dtype, V, D)
    projection, head = (nn.Linear(*s).to(DEVICE, dtype) for s in ((H, D), (D, V)))
    decoder = triton_token.Decoder(
        triton_token.DecodeWeights(
            embedding, module.all_weights, projection.weight, head.weight, head.bias
        ),
        batch,
        4,
    )
    decoder.set_prefix(projection.bias)
    ids = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    h, c = torch.zeros(2, 1, batch, H, device=DEVICE, dtype=dtype)

    def theirs() -> None:
        with torch.no_grad():
            out, state = module(F.embedding(ids, embedding)[:, None], (h, c))
            ids.copy_(head(projection(out[:, 0])).argmax(-1))
            h.copy_(state[0])
            c.copy_(state[1])

    goals = {"goal": 3.0, "goal_us": 15.0} if batch == 1 else {}
    token = triton_token.TokenGraph(decoder)
    return versus(f"token {NAMES[dtype]} B{batch}, graph", token.step, graphed(theirs), **goals)


def prefixes(sentences: int = 328, steps: int = 25) -> Iterator[Result]:
    """All prefixes of `sentences` of one length, against cuDNN on packed rows."""
    for dtype in NAMES:
        for training in (False, True):
            yield _prefixes(dtype, sentences, steps, training)


def _prefixes(dtype: torch.dtype, sentences: int, steps: int, training: bool) -> Result:
    module = _lstm(dtype)
    x, e = _random(dtype, sentences, steps, D), _random(dtype, sentences, steps, H)
    lengths = torch.arange(1, steps + 1).repeat(sentences)
    rows = x[:, None].expand(-1, steps, -1, -1).flatten(0, 1)
    packed = nn.utils.rnn.pack_padded_sequence(
        rows, lengths, batch_first=True, enforce_sorted=False
    )
    initial = e.flatten(0, 1)[None].contiguous()

    def ours() -> Any:
        with torch.set_grad_enabled(training):
            out = prefix_lstm(x, e, e, module.all_weights, backend="triton")
        return torch.autograd.grad(out.sum(), list(module.parameters())) if training else out

    def theirs() -> Any:
        with torch.set_grad_enabled(training):
            out = module(packed, (initial, initial))[1][0]
        return torch.autograd.grad(out.sum(), list(module.parameters())) if training else out

    name = f"prefixes {NAMES[dtype]} {len(lengths)} rows" + ", training" * training
    row = versus(name, ours, theirs, goal=4.0)
    if "us" in row:
        done = sentences * steps * (steps + 1) // 2  # steps of all rows together
        row["tflops"] = done * 8 * H * H * (3 if training else 1) / row["us"] / 1e6
    return row


def surprisals(n: int = 8192) -> Iterator[Result]:
    """Surprisal of n positions, against whole logits by PyTorch."""
    for dtype in NAMES:
        for training in (False, True):
            yield _surprisal(dtype, n, training)


def _surprisal(dtype: torch.dtype, n: int, training: bool) -> Result:
    shapes = ((n, D), (V, D), (V,))
    leaves = x, w, bias = [_random(dtype, *shape).requires_grad_() for shape in shapes]
    y = torch.randint(V, (n,), device=DEVICE)

    def ours() -> Any:
        with torch.set_grad_enabled(training):
            out = target_log_probs(x, w, bias, y, backend="triton").sum()
        return torch.autograd.grad(out, leaves) if training else out

    def theirs() -> Any:
        with torch.set_grad_enabled(training):
            out = -F.cross_entropy(F.linear(x, w, bias).float(), y, reduction="sum")
        return torch.autograd.grad(out, leaves) if training else out

    row = versus(f"surprisal {NAMES[dtype]} N{n}" + ", training" * training, ours, theirs)
    if "us" in row:
        row["tflops"] = 2 * n * D * V * (4 if training else 1) / row["us"] / 1e6
    return row


def floors(size: int = 1 << 30, order: int = 8192) -> Iterator[Result]:
    """What this chip can do: memory, products, and a grid that only waits for itself."""
    a = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    us = microseconds(lambda: b.copy_(a))
    yield {"case": f"copy {size} bytes", "ok": True, "us": us, "gb_per_s": 2 * size / us / 1e3}
    for dtype in NAMES:
        yield _product(dtype, order)
    for programs in (24, 48, 96, 128):
        yield _empty_steps(programs, 1000)


def _product(dtype: torch.dtype, order: int) -> Result:
    m = _random(dtype, order, order)
    us = microseconds(lambda: m @ m)
    row: Result = {"case": f"product {NAMES[dtype]} {order}^3", "ok": True, "us": us}
    return row | {"tflops": 2 * order**3 / us / 1e6}


def _empty_steps(programs: int, steps: int) -> Result:
    from fusion_model.kernels import triton_floor, triton_launch

    count = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    case = f"empty step, {programs} programs"

    def loop() -> None:
        count.zero_()
        triton_launch.launch_spinning(
            triton_floor.empty_steps, (programs, 1), (count, steps), count.device, LIMIT=0,
            num_warps=4,
        )  # fmt: skip

    try:
        return {"case": case, "ok": True, "us": microseconds(loop) / steps}
    except triton_launch.LaunchRefused as refused:  # a smaller chip: no failure of ours
        return {"case": case, "ok": True, "refused": str(refused)}
