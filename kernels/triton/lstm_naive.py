"""A layer's steps in plain PyTorch: what the LSTM kernels are held to, and their fallback.

Notation: as in `fusion_model.kernels.triton.layout`.
"""

import torch
from fusion_model.kernels.triton.layout import Backward, Forward, pack_parts, unpack


def plain_forward(args: Forward) -> None:
    """As `steps_forward`, in PyTorch: the reference, and what runs if the kernel is wrong."""
    x_gates, ids, w, h, c, keep, c_saved, gates, rows, shared, units = args
    offsets, start = rows.offsets(), 0
    for t in range(rows.steps):
        n, after = rows.active(t), len(c) + offsets[t]
        if ids is not None:
            x = x_gates[ids[t]]
        elif shared:
            x = x_gates[t * rows.batch : (t + 1) * rows.batch]
        else:
            x = x_gates[offsets[t] : offsets[t + 1]]
        x = x.repeat(n // len(x), 1)
        i, f, g, o = unpack((x + h[start : start + n] @ w.t()).float(), units)
        parts = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        c_next = parts[1] * c[:n] + parts[0] * parts[2]
        h_next = (parts[3] * torch.tanh(c_next)).to(h.dtype)
        if keep is not None:
            real = keep[t].bool().repeat(n // rows.batch)[:, None]
            c_next = torch.where(real, c_next, c[:n])
            h_next = torch.where(real, h_next, h[start : start + n])
        c[:n], h[after : after + n] = c_next, h_next
        if c_saved is not None and gates is not None:
            c_saved[after : after + n] = c_next
            gates[offsets[t] : offsets[t + 1]] = pack_parts(parts, units)
        start = after


def plain_backward(args: Backward) -> None:
    """As `steps_backward`, in PyTorch."""
    dh, dc, w, c_saved, gates, keep, grad, held, rows, units = args
    offsets, count = rows.offsets(), len(dc)
    following = grad[:0]
    for t in reversed(range(rows.steps)):
        n, after = rows.active(t), count + offsets[t]
        before = 0 if t == 0 else count + offsets[t - 1]
        d = dh[after : after + n].float()
        d[: len(following)] += (following @ w).float()
        i, f, g, o = unpack(gates[offsets[t] : offsets[t + 1]].float(), units)
        squashed = torch.tanh(c_saved[after : after + n])
        real = torch.ones(n, 1, dtype=torch.bool, device=dh.device)
        if keep is not None:
            d += held[:n]
            real = keep[t].bool().repeat(n // rows.batch)[:, None]
            held[:n] = torch.where(real, 0.0, d)
        through = dc[:n] + d * o * (1 - squashed**2)
        parts = (
            through * g * i * (1 - i),
            through * c_saved[before : before + n] * f * (1 - f),
            through * i * (1 - g**2),
            d * squashed * o * (1 - o),
        )
        dc[:n] = torch.where(real, through * f, dc[:n])
        following = grad[offsets[t] : offsets[t + 1]]
        following[:] = pack_parts([torch.where(real, p, 0.0) for p in parts], units)
