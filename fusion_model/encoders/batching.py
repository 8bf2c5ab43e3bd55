"""How many tokens an encoder takes at once, by the memory that is free; and going on with fewer."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion_model.errors import EncoderError

# Bytes of hidden states beyond which larger batches bring nothing: the products run at full speed,
# and on a CPU what a layer makes no longer stays in its cache.
ENOUGH = {"cpu": 2048 * 384 * 4}
ENOUGH_ON_GPU = 65536 * 384 * 4
LEAST = 256  # tokens; below, each call's own cost dominates
SHARE = 4  # a batch may take one part in so many of what is free


def token_budget(
    free: int | None, device_type: str, width: int, inner: int, heads: int, itemsize: int
) -> int:
    """Most tokens in a batch.

    Args:
        free: bytes of free memory; None where they are not known.
        device_type: `cpu`, `cuda` or another of PyTorch's.
        width: of the hidden states.
        inner: of the feed-forward part.
        heads: of attention.
        itemsize: bytes of a number.
    """
    enough = max(ENOUGH.get(device_type, ENOUGH_ON_GPU) // (width * itemsize), LEAST)
    if free is None:
        return enough
    return max(min(enough, free // SHARE // token_bytes(width, inner, heads, itemsize)), LEAST)


def token_bytes(width: int, inner: int, heads: int, itemsize: int) -> int:
    """What one token needs while a layer runs, at most."""
    states = 12 * width + 2 * inner  # queries, keys, values, in grids too; before and after parts
    return states * itemsize + 4 * 2 * 128 * heads  # scores, as far as they are all kept


def free_memory(device: torch.device) -> int | None:
    """Bytes: of a CUDA device's memory, or of RAM, as far as this process may have it."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    return free_ram()


def free_ram(root: Path = Path("/")) -> int | None:
    """Bytes, from Linux's /proc, a container's limit included; elsewhere what psutil says."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found = next(int(s.split()[1]) for s in lines if s.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):
        return _ram_by_psutil()
    try:
        group = root / "sys/fs/cgroup"
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            found = min(found, max(int(limit) - used, 0))
    except (OSError, ValueError):
        pass  # no container
    return found


def _ram_by_psutil() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def shrinking(
    places: Sequence[int],
    budget: int,
    encode: Callable[[Sequence[int], int], Iterator[Sequence[int]]],
    shrunk: Callable[[int], Any],
) -> Iterator[Sequence[int]]:
    """Places that are done, as they come; after an out-of-memory error with half the budget.

    Args:
        places: of the items.
        encode: called with places and a budget; yields places once their vectors are there.
        shrunk: told the new budget.

    Raises:
        EncoderError: memory does not hold even a small batch.
    """
    waiting = dict.fromkeys(places)
    while waiting:
        try:
            for done in encode(list(waiting), budget):
                for place in done:
                    del waiting[place]
                yield done
        except torch.OutOfMemoryError as error:
            if budget <= LEAST:
                raise EncoderError(
                    f"the device's memory does not hold {budget} encoder tokens: {error}"
                ) from error
            budget = max(budget // 2, LEAST)
            shrunk(budget)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def equal_lengths(items: Sequence[bytes], budget: int) -> Iterator[tuple[list[int], np.ndarray]]:
    """(places in `items`, their ids [N, L] int64) of batches of equal length, longest first.

    Longest first: if memory is short, it shows at once.

    Args:
        items: without duplicates.
        budget: most tokens in a batch; one item may exceed it.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        by_length[len(item) // 4].append(i)
    for length in sorted(by_length, reverse=True):
        rows = by_length[length]
        size = max(1, budget // length)
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            flat = np.frombuffer(b"".join(items[i] for i in chunk), dtype="<i4")
            yield chunk, flat.astype(np.int64).reshape(len(chunk), length)


def shared_batches(
    items: Sequence[bytes], budget: int
) -> Iterator[list[tuple[list[int], np.ndarray]]]:
    """`equal_lengths`, but batches of several lengths fill the budget together."""
    batch: list[tuple[list[int], np.ndarray]] = []
    room = budget
    for rows, ids in equal_lengths(items, budget):
        while len(rows):
            take = room // ids.shape[1] or (0 if batch else 1)
            if take:
                batch.append((rows[:take], ids[:take]))
                room -= ids[:take].size
            rows, ids = rows[take:], ids[take:]
            if len(rows):
                yield batch
                batch, room = [], budget
    if batch:
        yield batch
