"""Several processes share work.

They encode for one, each a share of every batch of inputs on its own device: the main process
plans and writes the store, the others only encode. Or each has documents of its own to score. Run
with `accelerate launch -m fusion_model.cli train …`, or `embed`, `score`, `evaluate`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from fusion_model import progress
from fusion_model.data.corpus import Corpus
from fusion_model.encoders import TextEncoder
from fusion_model.encoders.inputs import EncoderInput
from fusion_model.errors import EncoderError
from fusion_model.prefixes.embed import embed_corpus
from fusion_model.prefixes.planner import PrefixPlanner

Encode = Callable[[Sequence[EncoderInput]], Any]


@contextmanager
def shared_encoding(encoder: TextEncoder, rank: int, world: int) -> Iterator[Encode | None]:
    """The main process gets an `Encode` that all processes serve; the others None, when it ends.

    Args:
        encoder: this process's.
        rank, world: this process's number, 0 is the main one, and how many there are.

    Raises:
        EncoderError: in the main process, what went wrong in any.
    """
    if world == 1:
        yield encoder.encode
        return
    if rank:
        while (inputs := _broadcast(None)) is not None:
            gathered(_encoded(encoder, inputs, rank, world), rank, world)
        dist.barrier()
        yield None
        return

    def encode(inputs: Sequence[EncoderInput]) -> np.ndarray:
        _broadcast(list(inputs))
        parts = gathered(_encoded(encoder, inputs, rank, world), rank, world)
        for part in parts:
            if isinstance(part, str):
                raise EncoderError(part)
        return np.concatenate(parts)

    try:
        yield encode
    finally:
        _broadcast(None)
        dist.barrier()  # whoever ends first would take the connection down


def fill_store(
    corpus: Corpus,
    planner: PrefixPlanner,
    path: Path,
    rank: int,
    world: int,
    dtype: str | None = None,
) -> int | None:
    """All processes encode a corpus for the store at `path`, which the main one writes.

    Returns how many vectors the store then has; in the other processes None.
    """
    with shared_encoding(planner.encoder, rank, world) as encode:
        if encode is None:
            return None
        size = sum(corpus.positions)
        with (
            planner.open_store(path, dtype) as store,
            progress.track("prefix embeddings", size) as update,
        ):
            embed_corpus(corpus, planner, store, update, encode)
            return len(store)


def _encoded(
    encoder: TextEncoder, inputs: Sequence[EncoderInput], rank: int, world: int
) -> np.ndarray | str:
    """Vectors of this process's share, or what went wrong: the others must not wait for ever."""
    start, end = share_of(inputs, rank, world)
    try:
        return np.asarray(encoder.encode(inputs[start:end]))
    except (EncoderError, RuntimeError) as error:
        return f"process {rank}: {error}"


def share_of(inputs: Sequence[EncoderInput], rank: int, world: int) -> tuple[int, int]:
    """First and last + 1 of a process's inputs: neighbours, which may share work, and about as
    many bytes for each process."""
    return cut([len(given.to_bytes()) for given in inputs], rank, world)


def cut(sizes: Sequence[int], rank: int, world: int) -> tuple[int, int]:
    """First and last + 1 of a process's share: neighbours, about as much for each process."""
    ends = np.cumsum([0, *sizes])
    cuts = np.searchsorted(ends, ends[-1] * np.arange(world + 1) / world)
    return int(cuts[rank]), int(cuts[rank + 1])


def _broadcast(inputs: list[EncoderInput] | None) -> list[EncoderInput] | None:
    box: list[Any] = [inputs]
    dist.broadcast_object_list(box, src=0)
    found: list[EncoderInput] | None = box[0]
    return found


def gathered(part: Any, rank: int, world: int) -> list[Any]:
    """Every process's part, in their order; in all but the main one nothing."""
    parts: list[Any] = [None] * world
    dist.gather_object(part, parts if rank == 0 else None, dst=0)
    return parts if rank == 0 else []
