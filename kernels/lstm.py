"""LSTM over a batch of sequences, one or more layers.

Notation: B sequences, T steps, D input width, H hidden width, L layers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fusion_model.kernels.backend import resolve_backend
from torch import Tensor

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
            h_next, c_next = lstm_cell(gates[:, t] + F.linear(h, w_hh), c)
            if mask is None:
                h, c = h_next, c_next
            else:  # hold the state over padding
                keep = mask[:, t, None].bool()
                h, c = torch.where(keep, h_next, h), torch.where(keep, c_next, c)
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
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    backend = resolve_backend(backend, x.device, x.shape[1], operation="sequence", dtype=dtype)
    if backend == "reference" or (mask is not None and backend != "triton"):
        return lstm_sequence_reference(x, state, weights, mask, dropout)
    if dtype != x.dtype:
        # torch.lstm is on no autocast list: without this it runs in float32 (CPU).
        x, state = x.to(dtype), (state[0].to(dtype), state[1].to(dtype))
        weights = [[p.to(dtype) for p in layer] for layer in weights]
    if backend == "triton":
        from fusion_model.kernels.triton import lstm

        return lstm.lstm_sequence(x, state, weights, mask, dropout)
    rows = len(x)
    if device == "cpu" and dtype == torch.bfloat16 and rows > ROWS:
        spare = -rows % ROWS
        x = F.pad(x, (0, 0, 0, 0, 0, spare))
        state = F.pad(state[0], (0, 0, 0, 0, 0, spare)), F.pad(state[1], (0, 0, 0, 0, 0, spare))
    out, h, c = torch.lstm(
        x,
        [s.transpose(0, 1).contiguous() for s in state],
        [p for layer in weights for p in layer],
        True,  # has_biases
        len(weights),
        dropout,
        dropout > 0,  # train
        False,  # bidirectional
        True,  # batch_first
    )
    return out[:rows], (h.transpose(0, 1)[:rows], c.transpose(0, 1)[:rows])
