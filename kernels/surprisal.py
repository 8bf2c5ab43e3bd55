"""Log-probability of each target under a vocabulary projection.

Notation: N positions, D features, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256  # rows of logits alive at once outside training: 8 MB at V = 8192 in fp32


def target_log_probs(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """log p(targets) in nats, float32 (float64 for float64 input), [N].

    Outside training the logits exist for `CHUNK` positions at a time only.

    Args:
        x: features, [N, D].
        weight, bias: the projection, [V, D] and [V].
        targets: token ids, [N].
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _log_probs(x, weight, bias, targets)
    pieces = [
        _log_probs(a, weight, bias, b)
        for a, b in zip(x.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(pieces) if pieces else x.new_zeros(0)


def _log_probs(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    logits = F.linear(x, weight, bias)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return -F.cross_entropy(logits, targets, reduction="none")
