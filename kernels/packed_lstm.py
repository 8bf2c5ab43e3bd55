"""LSTM over sequences of different lengths without padding between them.

Notation: B sequences, T steps of the longest, M tokens of all together, D input width, H hidden
width, L layers.
"""

from collections.abc import Sequence

import torch
from fusion_model.kernels.backend import resolve_backend
from fusion_model.kernels.lstm import LayerWeights, State, lstm_sequence
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


def lstm_packed(
    x: PackedSequence,
    state: State,
    weights: Sequence[LayerWeights],
    *,
    dropout: float = 0.0,
    backend: str = "auto",
) -> tuple[PackedSequence, State]:
    """As `lstm_sequence`, for sequences that `torch.nn.utils.rnn` packed.

    Products for the inputs run on the M tokens alone; the recurrence holds what has ended.

    Args:
        x: inputs, data [M, D].
        state: initial (h, c), each [B, L, H], in the order in which the sequences were packed.
        weights: one `LayerWeights` a layer.
        dropout: probability between layers; 0 outside training.
        backend: one of `BACKENDS`.

    Returns:
        The top layer's h, data [M, H], and the state after each sequence's last token.

    Raises:
        ValueError: the backend cannot run here.
    """
    data, sizes, order, back = x
    kind = data.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else data.dtype
    chosen = resolve_backend(backend, data.device, len(sizes), operation="sequence", dtype=dtype)
    if chosen == "reference":
        padded, lengths = pad_packed_sequence(x, batch_first=True)
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).to(data.device)
        out, last = lstm_sequence(
            padded, state, weights, mask=mask, dropout=dropout, backend="reference"
        )
        return pack_padded_sequence(out, lengths, batch_first=True, enforce_sorted=False), last
    h, c = (_ordered(s.to(dtype), order) for s in state)
    cast = [[p.to(dtype) for p in layer] for layer in weights]
    if chosen == "triton":
        from fusion_model.kernels.triton import lstm

        found, (h, c) = lstm.lstm_packed(data.to(dtype), sizes, (h, c), cast, dropout)
    else:
        found, h, c = torch.lstm(
            data.to(dtype),
            sizes,
            [s.transpose(0, 1).contiguous() for s in (h, c)],
            [p for layer in cast for p in layer],
            True,  # has_biases
            len(cast),
            dropout,
            dropout > 0,  # train
            False,  # bidirectional
        )
        h, c = h.transpose(0, 1), c.transpose(0, 1)
    return PackedSequence(found, sizes, order, back), (_ordered(h, back), _ordered(c, back))


def _ordered(state: Tensor, order: Tensor | None) -> Tensor:
    return state if order is None else state.index_select(0, order)
