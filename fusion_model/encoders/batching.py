"""How many tokens an encoder takes at once. Nothing here needs PyTorch."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

# Bytes of hidden states beyond which larger batches bring nothing: the products run at full speed,
# and on a CPU what a layer makes no longer stays in its cache.
ENOUGH = {"cpu": 2048 * 384 * 4}
ENOUGH_ON_GPU = 65536 * 384 * 4
LEAST = 256  # tokens; below, each call's own cost dominates


def token_budget(device_type: str, width: int, itemsize: int) -> int:
    """Most tokens in a batch.

    Args:
        device_type: `cpu`, `cuda` or another of PyTorch's.
        width: of the hidden states.
        itemsize: bytes of a number.
    """
    return max(ENOUGH.get(device_type, ENOUGH_ON_GPU) // (width * itemsize), LEAST)


def equal_lengths(texts: Sequence[bytes], budget: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """(places in `texts`, their ids [N, L] int64) of batches of equal length, longest first.

    Longest first: if memory is short, it shows at once.

    Args:
        texts: ids of each as little-endian int32.
        budget: most tokens in a batch; one text may exceed it.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        by_length[len(text) // 4].append(i)
    for length in sorted(by_length, reverse=True):
        rows = by_length[length]
        size = max(1, budget // length)
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            flat = np.frombuffer(b"".join(texts[i] for i in chunk), dtype="<i4")
            yield chunk, flat.astype(np.int64).reshape(len(chunk), length)
