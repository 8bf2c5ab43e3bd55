"""LSTM over a batch of sequences, padded or not, one or more layers.

Notation: B sequences, T steps, D input width, H hidden width, L layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fusion_model.kernels.backend import compute_dtype, resolve_backend
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

ROWS = 16  # of a matrix tile: oneDNN's LSTM in bfloat16 takes up to 5 times as long for others

LayerWeights = Sequence[Tensor]
"""One layer as `torch.nn.LSTM` keeps it: w_ih [4H, D], w_hh [4H, H], b_ih [4H], b_hh [4H]."""

State = tuple[Tensor, Tensor]
"""(h, c), each [B, L, H]: batch first, so that beams can be re-ordered on dimension 0."""


def lstm_cell(gates: Tensor, c: Tensor) -> State:
    """Next (h, c), each [..., H], from gate pre-activations [..., 4H] and c [..., H]."""
    i, f, g, o = gates.chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def held(mask: Tensor | None, new: State, old: State) -> State:
    """The new (h, c), but the old where a mask [B] is false: over padding the state is held."""
    if mask is None:
        return new
    keep = mask[:, None].bool()
    return torch.where(keep, new[0], old[0]), torch.where(keep, new[1], old[1])


def lstm_sequence_reference(
    x: Tensor,
    state: State,
    weights: Sequence[LayerWeights],
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, State]:
    """The equations, step by step. Arguments as in `lstm_sequence`."""
    finals = []
    for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(weights):
        if layer and dropout:
            x = F.dropout(x, dropout)
        h, c = state[0][:, layer], state[1][:, layer]
        gates = F.linear(x, w_ih, b_ih + b_hh)
        outputs = []
        for t in range(x.shape[1]):
            new = lstm_cell(gates[:, t] + F.linear(h, w_hh), c)
            h, c = held(None if mask is None else mask[:, t], new, (h, c))
            outputs.append(h)
        x = torch.stack(outputs, dim=1)
        finals.append((h, c))
    return x, (torch.stack([h for h, _ in finals], 1), torch.stack([c for _, c in finals], 1))


def lstm_sequence(
    x: Tensor,
    state: State,
    weights: Sequence[LayerWeights],
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """Run all T steps and return the top layer's h, [B, T, H], and the final state.

    Args:
        x: inputs, [B, T, D].
        state: initial (h, c), each [B, L, H].
        weights: one `LayerWeights` a layer.
        mask: [B, T], true at real tokens; the state is held wherever it is false.
        dropout: probability between layers (not after the last); 0 outside training.
        backend: one of `BACKENDS`.

    Raises:
        ValueError: the backend cannot run here.
    """
    dtype = compute_dtype(x)
    backend = resolve_backend(backend, x.device, x.shape[1], operation="sequence", dtype=dtype)
    if backend == "triton":
        from fusion_model.kernels.triton import lstm

        return lstm.lstm_sequence(*cast(dtype, x, state, weights), mask, dropout)
    if backend == "reference":
        return lstm_sequence_reference(x, state, weights, mask, dropout)
    rows, (x, state, weights) = len(x), cast(dtype, x, state, weights)
    if mask is not None:
        return _packed(x, state, weights, mask, dropout)
    if x.device.type == "cpu" and dtype == torch.bfloat16 and rows > ROWS:
        spare = -rows % ROWS
        x = F.pad(x, (0, 0, 0, 0, 0, spare))
        state = F.pad(state[0], (0, 0, 0, 0, 0, spare)), F.pad(state[1], (0, 0, 0, 0, 0, spare))
    out, (h, c) = _torch_lstm((x,), state, weights, dropout, True)
    return out[:rows], (h[:rows], c[:rows])


def _packed(
    x: Tensor, state: State, weights: Sequence[LayerWeights], mask: Tensor, dropout: float
) -> tuple[Tensor, State]:
    """The real tokens alone, as one call on packed sequences; each output goes where it belongs."""
    real = mask.bool().cpu()  # lengths are needed there
    lengths, order = real.sum(1), real.int().argsort(dim=1, descending=True, stable=True)
    order = order[:, : max(1, int(lengths.max()))].to(x.device)
    tokens = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
    data, sizes, sort, back = pack_padded_sequence(
        tokens, lengths.clamp(min=1), batch_first=True, enforce_sorted=False
    )
    assert sort is not None
    assert back is not None
    first = state[0].index_select(0, sort), state[1].index_select(0, sort)
    data, last = _torch_lstm((data, sizes), first, weights, dropout)
    out, _ = pad_packed_sequence(PackedSequence(data, sizes, sort, back), batch_first=True)
    out = torch.cat([state[0][:, -1:], out], 1)  # before its first token a row holds its state
    done = real.cumsum(1).to(x.device)
    some = (lengths > 0)[:, None, None].to(x.device)
    h, c = (torch.where(some, new[back], old) for new, old in zip(last, state, strict=True))
    return out.gather(1, done[..., None].expand(-1, -1, out.shape[2])), (h, c)


def lstm_tokens(
    ids: Tensor,
    embedding: Tensor,
    state: State,
    weights: Sequence[LayerWeights],
    *,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, State]:
    """`lstm_sequence` of embedding [V, D] at tokens [B, T].

    Where no gradient is wanted the Triton kernels read a table of all tokens' input gates.
    """
    device = ids.device
    chosen = resolve_backend(backend, device, ids.shape[1], dtype=embedding.dtype)
    plain = not torch.is_grad_enabled() and not torch.is_autocast_enabled(device.type)
    if chosen == "triton" and plain:
        from fusion_model.kernels.triton import lstm

        if lstm.can_be_tabled(embedding, weights[0]):
            return lstm.lstm_tokens(ids, embedding, state, weights, mask)
    return lstm_sequence(F.embedding(ids, embedding), state, weights, mask=mask, backend=backend)


def cast(
    dtype: torch.dtype, x: Tensor, state: State, weights: Sequence[LayerWeights]
) -> tuple[Tensor, State, Sequence[LayerWeights]]:
    """All in this dtype, of autocast: torch.lstm is on no list of it on a CPU."""
    if dtype == x.dtype:
        return x, state, weights
    layers = [[p.to(dtype) for p in layer] for layer in weights]
    return x.to(dtype), (state[0].to(dtype), state[1].to(dtype)), layers


def flatten(weights: Sequence[LayerWeights]) -> None:
    """Move weights for cuDNN into one piece of memory: others it copies at every call.

    `nn.LSTM` does so by itself, but not in bfloat16.
    """
    flat = [p for layer in weights for p in layer]
    scattered = len({p.untyped_storage()._cdata for p in flat}) > 1
    if flat[0].device.type == "cuda" and flat[0].dtype == torch.bfloat16 and scattered:
        hidden, width = flat[0].shape[0] // 4, flat[0].shape[1]
        with torch.no_grad():  # 2: cuDNN's number of an LSTM
            torch._cudnn_rnn_flatten_weight(flat, 4, width, 2, hidden, 0, len(weights), True, False)


def _torch_lstm(
    inputs: tuple[Tensor, ...],
    state: State,
    weights: Sequence[LayerWeights],
    dropout: float,
    *batch_first: bool,
) -> tuple[Tensor, State]:
    """PyTorch's own; inputs [B, T, D], or data and batch sizes of packed sequences."""
    kind = inputs[0].device.type
    # cuDNN goes backward after a call in training mode only. Its autocast would take float16.
    train = dropout > 0 or (kind == "cuda" and torch.is_grad_enabled())
    run: Any = torch.lstm
    flatten(weights)
    with torch.autocast(kind, enabled=False):
        out, h, c = run(
            *inputs,
            [s.transpose(0, 1).contiguous() for s in state],
            [p for layer in weights for p in layer],
            True,  # has_biases
            len(weights),
            dropout,
            train,
            False,  # bidirectional
            *batch_first,
        )
    return out, (h.transpose(0, 1), c.transpose(0, 1))
