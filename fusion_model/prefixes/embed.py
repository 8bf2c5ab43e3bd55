"""Encode what a store lacks of a corpus."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fusion_model.data.batches import Vectors
from fusion_model.data.corpus import Corpus
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.prefixes.store import digest

POSITIONS_PER_CHUNK = 2048  # encoded and committed at once; seconds on two cores
ON_GPU = 32  # times as many


def embed_corpus(
    corpus: Corpus,
    planner: PrefixPlanner,
    store: Vectors,
    progress: Callable[[int, int], Any] | None = None,
    encode: Callable[..., Any] | None = None,
) -> np.ndarray:
    """Encode what the store lacks, and return the store row of every position, [P] int64.

    Duplicates across the corpus run once. Each chunk is committed as it is done, so an
    interrupted job goes on where it stopped.

    Args:
        progress: called with the positions that are done, and all.
        encode: in place of the encoder's own, see `fusion_model.prefixes.distributed`.
    """
    encode = encode or planner.encoder.encode
    positions = corpus.positions
    total = sum(positions)
    rows = np.empty(total, dtype=np.int64)
    device = getattr(getattr(planner.encoder, "model", None), "device", None)
    chunk = POSITIONS_PER_CHUNK * (1 if device is None or device.type == "cpu" else ON_GPU)
    done = first = 0
    while first < len(corpus.sentences):
        last, size = first, 0
        while last < len(corpus.sentences) and (size == 0 or size < chunk):
            size += positions[last]
            last += 1
        previous: list[Sequence[int]] = [
            () if corpus.starts_document[i] else corpus.sentences[i - 1] for i in range(first, last)
        ]
        inputs = planner.inputs(corpus.sentences[first:last], previous)
        keys = [digest(given.to_bytes()) for given in inputs]
        new = {k: given for k, given in zip(keys, inputs, strict=True) if store.row(k) < 0}
        if new:
            store.append(list(new), encode(list(new.values())))
        rows[done : done + size] = [store.row(key) for key in keys]
        done, first = done + size, last
        if progress:
            progress(done, total)
    return rows
