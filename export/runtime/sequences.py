"""Scoring: the sequence graph over padded batches, its state going on where it is given one.

Notation: B sequences, T tokens, E width of the prefix embeddings, L layers, H hidden width.
Nothing here needs PyTorch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusion_model.errors import ExportError

ROWS, CELLS = 64, 65_536  # early fusion: prefixes run at once, and steps of all of them
# Other fusions on a CPU: numbers [tokens, V] at once, few enough for its caches to hold.
SCORES = 2**21


class Sequences:
    """The sequence graph of an export.

    Args:
        session: of `model.onnx`.
        model: the manifest's part on the model.
    """

    def __init__(self, session: Any, model: dict[str, Any]) -> None:
        self._session, self._model = session, model
        self._inputs = {i.name: i.type for i in session.get_inputs()}
        self._on_cpu = session.get_providers()[0] == "CPUExecutionProvider"

    def check_ids(self, ids: np.ndarray) -> None:
        """Refuse what is no [B, T] of tokens of the vocabulary; see `check`."""
        vocabulary = self._model["vocab_size"]
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise ExportError(
                f"input_ids is {ids.dtype} of shape {list(ids.shape)}: expected integers, [B, T]"
            )
        if ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
            raise ExportError(
                f"input_ids holds {ids.min()}..{ids.max()}: this model has tokens "
                f"0..{vocabulary - 1}"
            )

    def check(self, ids: np.ndarray, e: np.ndarray | None) -> None:
        """Refuse ids outside the vocabulary, and embeddings of the wrong width or shape.

        Args:
            ids: tokens that are read, [B, T] int64.
            e: embeddings of the prefixes that end at them, [B, T, E].

        Raises:
            ExportError: what was given, and what is needed.
        """
        self.check_ids(ids)
        size = self._model["prefix_size"]
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
        state: Any = None,
    ) -> tuple[np.ndarray, np.ndarray, Any]:
        """Log-probabilities of targets and of boundary tokens, and the state after.

        Args:
            ids: [B, T] int64.
            targets: [B, T] int64, tokens of the vocabulary.
            e: [B, T, E] float32, or None.
            boundary: [K] int64, K at least 1.
            state: of an earlier call: (h, c), [L, B, H] each; of early fusion, where every
                prefix starts anew, the tokens before, [B, S].

        Raises:
            ExportError: see `check`.
        """
        self.check(ids, e)
        if not ids.size:
            empty = np.zeros(ids.shape, dtype=np.float32)
            return empty, empty, state
        feed = {"targets": targets, "boundary_ids": boundary, "input_ids": ids}
        if "prefix_embeds" in self._inputs and e is not None:
            feed["prefix_embeds"] = e.astype(np.float32, copy=False)
        names = ["target_log_probs", "boundary_log_probs"]
        early, steps, whole = "h0" not in self._inputs, ids.shape[1], ids
        if early:  # some prefixes at a time: the first ones are short, and so is their run
            whole = ids if state is None else np.concatenate([state, ids], axis=1)
            steps = int(np.clip(CELLS // whole.size, 1, ROWS))
        else:
            names += ["h", "c"]
            state = self._zeros(len(ids)) if state is None else state
            if self._on_cpu:
                steps = max(1, SCORES // (self._model["vocab_size"] * len(ids)))
        pieces = []
        for at in range(0, ids.shape[1], steps):
            end = min(at + steps, ids.shape[1])
            some = {n: v if n == "boundary_ids" else v[:, at:end] for n, v in feed.items()}
            if early:
                some["input_ids"] = whole[:, : whole.shape[1] - ids.shape[1] + end]
            else:
                some |= zip(("h0", "c0"), state, strict=True)
            target, edge, *state = self._session.run(names, some)
            pieces.append((target, edge))
        target, edge = (np.concatenate(piece, axis=1) for piece in zip(*pieces, strict=True))
        return target, edge, whole if early else state

    def _zeros(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The state before the first token, (h, c)."""
        shape = (self._model["num_layers"], batch, self._model["hidden_size"])
        zeros = np.zeros(shape, np.float16 if "float16" in self._inputs["h0"] else np.float32)
        return zeros, zeros

    def probe(self) -> np.ndarray:
        """Log-probabilities of fixed tokens under fixed embeddings, [N]: alike on all devices."""
        generator = np.random.default_rng(0)
        ids, targets = generator.integers(self._model["vocab_size"], size=(2, 2, 9))
        e = generator.normal(0, 0.1, (2, 9, self._model["prefix_size"])).astype(np.float32)
        return self.run(ids, targets, e, np.zeros(1, dtype=np.int64))[0].ravel()

    def check_probe(self, expected: Sequence[float]) -> None:
        """Raise `ExportError` where this device's probe is not the one that was exported."""
        error = float(np.abs(self.probe() - np.array(expected)).max())
        half = any("float16" in kind for kind in self._inputs.values())
        if not error <= (5e-2 if half else 1e-3):
            raise ExportError(
                f"on this device log-probabilities are up to {error:.2g} nats from those that were "
                "verified at export: use device cpu, and another driver or ONNX Runtime"
            )
