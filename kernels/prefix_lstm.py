"""All prefixes of a sentence at once, each with an initial state of its own (early fusion).

Row r runs over tokens 0..start+r from its own (h0, c0). The input gates of a step depend on
the token alone, so they are computed once and shared by all rows; a row leaves the batch at
its last token, so step t works on the rows that are still active and on no padding.

Notation: B sequences, T steps, R = T - start prefix rows, D input width, H hidden, L layers.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fusion_model.kernels.backend import compute_dtype, resolve_backend
from fusion_model.kernels.lstm import LayerWeights, cast, held, lstm_cell
from torch import Tensor


def prefix_lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[LayerWeights],
    *,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Top layer's h at the end of each prefix, [B, R, H].

    Args:
        x: inputs of the whole sentences, [B, T, D].
        h0, c0: initial states, [B, R, H]; row r belongs to the prefix that ends at token
            T - R + r. Every layer starts from them.
        weights: one `LayerWeights` a layer.
        mask: [B, T], true at real tokens; the state is held wherever it is false.
        dropout: probability between layers; 0 outside training.
        backend: one of `BACKENDS`; all but `triton` run the plain equations.

    Raises:
        ValueError: the backend cannot run here.
    """
    dtype = compute_dtype(x)
    if resolve_backend(backend, x.device, operation="prefix", dtype=dtype) == "triton":
        from fusion_model.kernels.triton import lstm

        x, (h0, c0), weights = cast(dtype, x, (h0, c0), weights)
        return lstm.prefix_lstm(x, h0, c0, weights, mask, dropout)
    start = x.shape[1] - h0.shape[1]
    w_ih, _, b_ih, b_hh = weights[0]
    shared_gates = F.linear(x, w_ih, b_ih + b_hh)  # [B, T, 4H]
    # Rows first: the active rows are then always a trailing slice, without a copy.
    h = [h0.transpose(0, 1)] * len(weights)
    c = [c0.transpose(0, 1)] * len(weights)
    finished = []
    for t in range(x.shape[1]):
        real = None if mask is None else mask[:, t]
        below = h[0]
        for layer, (w_ih, w_hh, b_ih, b_hh) in enumerate(weights):
            if layer == 0:
                gates = shared_gates[:, t]
            else:
                gates = F.linear(F.dropout(below, dropout, dropout > 0), w_ih, b_ih + b_hh)
            new = lstm_cell(gates + F.linear(h[layer], w_hh), c[layer])
            below, c[layer] = held(real, new, (h[layer], c[layer]))
            h[layer] = below
        if t >= start:
            finished.append(below[0])
            h, c = [s[1:] for s in h], [s[1:] for s in c]
    return torch.stack(finished, dim=1)
