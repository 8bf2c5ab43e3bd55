"""Scoring: the sequence graph over padded batches, and over articles with the state going on.

Notation: B sequences, T tokens, E width of the prefix embeddings, L layers, H hidden width.
Nothing here needs PyTorch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fusion_model.data.batches import Batching
from fusion_model.errors import ExportError
from fusion_model.surprisal import SentenceScores

State = tuple[np.ndarray, np.ndarray]
TOKENS_PER_BATCH = 2048
ROWS, CELLS = 64, 65_536  # early fusion: prefixes run at once, and steps of all of them


class VectorRows:
    """Vectors by key, in memory; see `fusion_model.data.batches.KeyedRows`."""

    def __init__(self, dim: int) -> None:
        self._rows: dict[bytes, int] = {}
        self._vectors = np.zeros((0, dim), dtype=np.float32)

    def row(self, key: bytes) -> int:
        """Row of a key, -1 where there is none."""
        return self._rows.get(key, -1)

    def append(self, keys: Sequence[bytes], vectors: np.ndarray) -> None:
        """Add rows, [len(keys), dim]."""
        first = len(self._vectors)
        self._rows.update((key, first + i) for i, key in enumerate(keys))
        self._vectors = np.concatenate([self._vectors, vectors])

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Vectors of rows, [*rows.shape, dim] float32."""
        return self._vectors[rows]


class Sequences:
    """The sequence graph of an export.

    Args:
        session: of `model.onnx`.
        model: the manifest's part on the model.
    """

    def __init__(self, session: Any, model: dict[str, Any]) -> None:
        self._session, self._model = session, model
        self._inputs = {i.name: i.type for i in session.get_inputs()}
        self.carries_state = "h0" in self._inputs

    def initial_state(self, batch: int) -> State:
        """Zeros, [L, B, H] each."""
        shape = (self._model["num_layers"], batch, self._model["hidden_size"])
        zeros = np.zeros(shape, np.float16 if "float16" in self._inputs["h0"] else np.float32)
        return zeros, zeros

    def check(self, ids: np.ndarray, e: np.ndarray | None) -> None:
        """Refuse ids outside the vocabulary, and embeddings of the wrong width or shape.

        Args:
            ids: tokens that are read, [B, T] int64.
            e: embeddings of the prefixes that end at them, [B, T, E].

        Raises:
            ExportError: what was given, and what is needed.
        """
        vocabulary, size = self._model["vocab_size"], self._model["prefix_size"]
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ExportError(
                f"input_ids is {ids.dtype} of shape {list(ids.shape)}: expected integers, [B, T]"
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
            raise ExportError(
                f"input_ids holds {ids.min()}..{ids.max()}: this model has tokens "
                f"0..{vocabulary - 1}"
            )
        if self._model["fusion"] == "none":
            return
        expected = [*ids.shape, size]
        if e is None:
            raise ExportError(
                f"fusion={self._model['fusion']!r} needs prefix_embeds, {expected}: pass them"
            )
        if list(e.shape) != expected:
            raise ExportError(
                f"prefix_embeds has shape {list(e.shape)}: expected {expected}, one a position"
            )
        if not np.isfinite(e).all():
            where = np.argwhere(~np.isfinite(e))[0].tolist()
            raise ExportError(f"prefix_embeds holds NaN or infinity, first at {where}")

    def run(
        self,
        ids: np.ndarray,
        targets: np.ndarray,
        e: np.ndarray | None,
        boundary: np.ndarray,
        state: State | None = None,
    ) -> tuple[np.ndarray, np.ndarray, State | None]:
        """Log-probabilities of targets and of boundary tokens, and the state after.

        Args:
            ids: [B, T] int64; early fusion: also the tokens before the prefixes, [B, S + T].
            targets: [B, T].
            e: [B, T, E] float32, or None.
            boundary: [K] int64, K at least 1.
            state: the state before (default: zeros); early fusion has none.
        """
        feed = {"input_ids": ids, "targets": targets, "boundary_ids": boundary}
        if "prefix_embeds" in self._inputs and e is not None:
            feed["prefix_embeds"] = e.astype(np.float32, copy=False)
        if not self.carries_state:
            return *self._run_prefixes(feed), None
        feed["h0"], feed["c0"] = state or self.initial_state(len(ids))
        names = ["target_log_probs", "boundary_log_probs", "h", "c"]
        target, edge, h, c = self._session.run(names, feed)
        return target, edge, (h, c)

    def _run_prefixes(self, feed: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Early fusion, some prefixes at a time: the first ones are short, and so is their run."""
        (batch, length), rows = feed["input_ids"].shape, feed["targets"].shape[1]
        size = int(np.clip(CELLS // (batch * length), 1, ROWS))
        names, pieces = ["target_log_probs", "boundary_log_probs"], []
        for first in range(0, rows, size):
            end = min(first + size, rows)
            some = feed | {
                "input_ids": feed["input_ids"][:, : length - rows + end],
                "targets": feed["targets"][:, first:end],
                "prefix_embeds": feed["prefix_embeds"][:, first:end],
            }
            pieces.append(self._session.run(names, some))
        target, edge = (np.concatenate(piece, axis=1) for piece in zip(*pieces, strict=True))
        return target, edge

    def score_sentences(
        self, batching: Batching, vectors: VectorRows | None, boundary_ids: list[int] | None
    ) -> list[SentenceScores]:
        """Every sentence on its own, in the corpus' order."""
        results: dict[int, SentenceScores] = {}
        boundary = np.array(boundary_ids or [0], dtype=np.int64)
        for indices in batching.plan(TOKENS_PER_BATCH):
            ids, lengths, rows = batching.padded(indices)
            e = None if rows is None or vectors is None else vectors.gather(rows)
            self.check(ids[:, :-1], e)
            target, edge, _ = self.run(ids[:, :-1], ids[:, 1:], e, boundary)
            for row, index in enumerate(indices):
                own = slice(0, int(lengths[row]) - 1)
                spaces = -edge[row, own] if boundary_ids else None
                results[int(index)] = SentenceScores(-target[row, own], spaces)
        return [results[i] for i in range(len(batching.lengths))]

    def score_articles(
        self,
        batching: Batching,
        vectors: VectorRows | None,
        starts: Sequence[bool],
        boundary_ids: list[int] | None,
    ) -> Iterator[SentenceScores]:
        """As `score_sentences`, but the state goes on; see `fusion_model.scoring`."""
        boundary = np.array(boundary_ids or [0], dtype=np.int64)
        state: State | None = None
        before = np.zeros((1, 0), dtype=np.int64)  # early fusion reads the article anew
        for index, first in enumerate(starts):
            ids, _, rows = batching.padded([index])
            e = None if rows is None or vectors is None else vectors.gather(rows)
            self.check(ids[:, :-1], e)
            if first:
                state, before = None, before[:, :0]
            if self.carries_state:  # EOS is read too, on the way to the next sentence
                e = None if e is None else np.concatenate([e, e[:, -1:]], axis=1)
                targets = np.concatenate([ids[:, 1:], ids[:, :1]], axis=1)
                target, edge, state = self.run(ids, targets, e, boundary, state)
            else:
                whole = np.concatenate([before, ids[:, :-1]], axis=1)
                target, edge, _ = self.run(whole, ids[:, 1:], e, boundary)
                before = np.concatenate([before, ids], axis=1)
            real = slice(0, ids.shape[1] - 1)
            yield SentenceScores(-target[0, real], -edge[0, real] if boundary_ids else None)
