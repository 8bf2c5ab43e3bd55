"""Times on the GPU at hand: the kernels, and cuDNN or PyTorch beside them, eager and as graphs.

The published sizes: D = 512, V = 8192, H = 768 unless a row says otherwise. Times are medians
after a warm-up; both sides of a ratio run in the same process, one after
the other.

Notation: B sequences, T steps, D input width, H hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fusion_model.benchmarks.measure.timing import microseconds
from fusion_model.kernels.check.cases import Named, Result
from fusion_model.kernels.cuda_graphs import record
from fusion_model.kernels.linear_cross_entropy import target_log_probs
from fusion_model.kernels.lstm import flatten
from fusion_model.kernels.prefix_lstm import prefix_lstm
from torch import Tensor, nn

DEVICE = "cuda"
D, H, V = 512, 768, 8192
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def graphed(run: Callable[[], Any]) -> Callable[[], None]:
    """The same work as one CUDA graph."""
    replay: Callable[[], None] = record(run)[0].replay
    return replay


def versus(make: Callable[[], Pair], graph: bool, **more: Any) -> Result:
    """Both times, and their ratio; a baseline that fails leaves the ratio unmeasured."""
    row: Result = {"ok": True, **more}
    for side, run in zip(("us", "baseline_us"), make(), strict=True):
        try:
            row[side] = microseconds(graphed(run) if graph else run)
        except Exception as error:
            row["ok"] = row["ok"] and side != "us"
            row[f"{side}_error"] = f"{type(error).__name__}: {error}"[:300]
    if "us" in row and "baseline_us" in row:
        row["ratio"] = row["baseline_us"] / row["us"]
    return row


def both(name: str, make: Callable[[], Pair], tags: list[str], **more: Any) -> list[Named]:
    """The same eager, and as a graph, which launches at no cost.

    Rows that have `auto`, an operation, a dtype and perhaps training, decide what `auto` takes.
    """
    graph_tags = [*tags, f"{tags[0]} graph"] if tags else []
    # Tokens are always decoded by graphs.
    eager = {k: v for k, v in more.items() if k != "auto" or not v.startswith("decode")}
    return [
        (f"{name}, eager", partial(versus, make, False, tags=tags, **eager)),
        (f"{name}, graph", partial(versus, make, True, tags=graph_tags, **more)),
    ]


def _lstm(dtype: torch.dtype, hidden: int, training: bool = False) -> nn.LSTM:
    """The baseline at its best: one piece of memory, and nothing kept for a backward pass."""
    module = nn.LSTM(D, hidden, batch_first=True).to(DEVICE, dtype).train(training)
    flatten(module.all_weights)
    return module


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def sequences(device: torch.device, steps: int = 256) -> Iterator[Named]:
    """Inference from a table of input gates, and training steps, against nn.LSTM."""
    for dtype, kind in NAMES.items():
        for batch in (1, 16, 64, 256):
            yield from _sequence(dtype, batch, H, steps, True)
        if kind == "bf16":  # other widths: padded, and a launch a step
            for hidden, batch in ((650, 16), (1500, 64)):
                yield from _sequence(dtype, batch, hidden, steps, False)


def _sequence(
    dtype: torch.dtype, batch: int, hidden: int, steps: int, tagged: bool
) -> Iterator[Named]:
    name = f"{NAMES[dtype]} B{batch} H{hidden} T{steps}"
    tags = {False: ["sequence 256" if batch == 256 else "sequence"], True: ["training"]}
    for training, what in ((False, "sequence"), (True, "training step")):
        make = partial(_training_pair if training else _inference_pair, dtype, batch, hidden, steps)
        # There cuDNN has a persistent kernel of its own; elsewhere it launches every step.
        hard = dtype == torch.float16 and hidden % 128 == 0 and batch % 8 == 0 and batch <= 128
        more: dict[str, Any] = {"steps": steps}
        if hard:
            more["cudnn"] = "persistent"
        if tagged:
            more["auto"] = f"sequence {NAMES[dtype]}" + " training" * training
        yield from both(f"{what} {name}", make, tags[training] if tagged else [], **more)


def _inference_pair(dtype: torch.dtype, batch: int, hidden: int, steps: int) -> Pair:
    from fusion_model.kernels.triton import lstm

    module, embedding = _lstm(dtype, hidden), _random(dtype, V, D)
    weights = module.all_weights
    ids = torch.randint(V, (batch, steps), device=DEVICE)
    zeros = torch.zeros(batch, 1, hidden, device=DEVICE, dtype=dtype)
    inner = (zeros.transpose(0, 1), zeros.transpose(0, 1))

    @torch.no_grad()
    def theirs() -> Any:
        return module(F.embedding(ids, embedding), inner)

    return partial(lstm.lstm_tokens, ids, embedding, (zeros, zeros), weights), theirs


def _training_pair(dtype: torch.dtype, batch: int, hidden: int, steps: int) -> Pair:
    from fusion_model.kernels.triton import lstm

    module, x = _lstm(dtype, hidden, True), _random(dtype, batch, steps, D)
    upstream, weights = _random(dtype, batch, steps, hidden), module.all_weights
    zeros = torch.zeros(batch, 1, hidden, device=DEVICE, dtype=dtype)
    inner = (zeros.transpose(0, 1), zeros.transpose(0, 1))

    def ours() -> Any:
        out, _ = lstm.lstm_sequence(x, (zeros, zeros), weights)
        return torch.autograd.grad(out, weights[0], upstream)

    def theirs() -> Any:
        return torch.autograd.grad(module(x, inner)[0], weights[0], upstream)

    return ours, theirs


def tokens(device: torch.device) -> Iterator[Named]:
    """Greedy tokens, as many as a graph of `generate` holds: cell, projection, choice."""
    from fusion_model.kernels.triton.decoder import TOKENS

    for dtype, kind in NAMES.items():
        for batch in (1, 16):
            make = partial(_tokens, dtype, batch, TOKENS)
            tags = [f"token {batch}"]
            more = {"steps": TOKENS, "auto": f"decode {kind}"}
            yield from both(f"{TOKENS} tokens {kind} B{batch}", make, tags, **more)


@torch.no_grad()
def _tokens(dtype: torch.dtype, batch: int, count: int) -> Pair:
    from fusion_model.kernels.triton import decoder as triton_token

    module, embedding = _lstm(dtype, H), _random(dtype, V, D)
    projection, head = (nn.Linear(*s).to(DEVICE, dtype) for s in ((H, D), (D, V)))
    weights = triton_token.DecodeWeights(
        embedding, module.all_weights, projection.weight, head.weight, head.bias
    )
    decoder = triton_token.Decoder(weights, batch, 4)
    decoder.set_prefix(projection.bias)
    ids = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    h, c = torch.zeros(2, 1, batch, H, device=DEVICE, dtype=dtype)

    @torch.no_grad()
    def theirs() -> None:
        for _ in range(count):
            out, state = module(F.embedding(ids, embedding)[:, None], (h, c))
            ids.copy_(head(projection(out[:, 0])).argmax(-1))
            h.copy_(state[0])
            c.copy_(state[1])

    return partial(decoder.run, count), theirs


def prefixes(device: torch.device, sentences: int = 328, steps: int = 25) -> Iterator[Named]:
    """All prefixes of `sentences` of one length, against cuDNN on packed rows."""
    for dtype, kind in NAMES.items():
        for training in (False, True):
            name = f"prefixes {kind} {sentences * steps} rows" + ", training" * training
            make = partial(_prefixes, dtype, sentences, steps, training)
            auto = f"prefix {kind}" + " training" * training
            yield from both(name, make, [] if training else ["prefixes"], auto=auto)


def _prefixes(dtype: torch.dtype, sentences: int, steps: int, training: bool) -> Pair:
    module = _lstm(dtype, H, training)
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

    return ours, theirs


def surprisals(device: torch.device, n: int = 8192) -> Iterator[Named]:
    """Surprisal of n positions, against whole logits by PyTorch."""
    for dtype, kind in NAMES.items():
        for training in (False, True):
            name = f"surprisal {kind} N{n}" + ", training" * training
            auto = f"surprisal {kind}" + " training" * training
            yield from both(name, partial(_surprisal, dtype, n, training), [], auto=auto)


def _surprisal(dtype: torch.dtype, n: int, training: bool) -> Pair:
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

    return ours, theirs
