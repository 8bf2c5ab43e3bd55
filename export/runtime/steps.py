"""Generation's inner loop: the step graph, its state kept on the device between calls.

State values are given from one call to the next by IO binding, so nothing of them is copied, nor
crosses to the host: the graph re-orders rows (beam search), too. Nothing here needs
PyTorch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fusion_model.export.runtime.session import runtime

PrefixEmbeds = Callable[[Sequence[Sequence[int]], int], np.ndarray]
"""(rows, n) -> embeddings of the prefixes that end at the last n tokens of each, [B, n, E]."""

State = tuple[Any, Any]
"""(h, c), each an OrtValue [L, B, H] on the session's device."""


class Steps:
    """Rows of tokens that grow by one token a call.

    Args:
        session: of `step.onnx`.
        model: the manifest's part on the model.
        device: `cpu` or `cuda`, where the session runs.
        prefix_embeds: where the embeddings come from; None for an unfused model.
        one_vector: the embedding is the same for all prefixes, so that early fusion, too, goes
            on from its state.
    """

    def __init__(
        self,
        session: Any,
        model: dict[str, Any],
        device: str,
        prefix_embeds: PrefixEmbeds | None,
        one_vector: bool = False,
    ) -> None:
        self._session, self._model, self._device = session, model, device
        self.prefix_embeds = prefix_embeds
        inputs = {i.name: i.type for i in session.get_inputs()}
        self._early, self._reorders = "fresh" in inputs, "rows" in inputs
        self._anew = self._early and not one_vector  # every prefix from its own embedding
        self._per_token = model["fusion"] == "input"
        self._dtype = np.float16 if "float16" in inputs["h0"] else np.float32
        self._binding = session.io_binding()
        self._state: State | None = None
        self.rows: list[list[int]] = []

    def start(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Read the prompts; scores of the token after each, [B, V] float32.

        Prompts of one length run together; their states are joined once.
        """
        self.rows = [list(row) for row in rows]
        logits, states, order = self._read(self.rows)
        if self._anew:
            return logits
        if len(states) == 1:
            self._state = states[0]
            return logits
        back = np.argsort(order)
        self._state = self._placed(
            *(np.concatenate([s[k].numpy() for s in states], axis=1)[:, back] for k in (0, 1))
        )
        return logits

    def advance(self, tokens: Sequence[int], order: Sequence[int]) -> np.ndarray:
        """Add a token to each row; scores of the token after it, [len(tokens), V] float32.

        Args:
            tokens: of the new rows.
            order: which old row each new one goes on from.
        """
        order = list(order)
        if not self._reorders and order != [*range(len(self.rows))] and self._state is not None:
            # An export of before the graph did it.
            h, c = (s.numpy()[:, order] for s in self._state)
            self._state = self._placed(h, c)
        self.rows = [
            [*self.rows[row], int(token)] for row, token in zip(order, tokens, strict=True)
        ]
        if self._anew:
            return self._read(self.rows)[0]
        assert self._state is not None
        new = [[row[-1]] for row in self.rows]
        logits, self._state = self._run(self.rows, new, self._state, order, fresh=False)
        return logits

    def _read(self, rows: list[list[int]]) -> tuple[np.ndarray, list[State], list[int]]:
        """Whole rows from their beginning: scores [B, V]; states by length, and whose they are."""
        logits = np.empty((len(rows), self._model["vocab_size"]), dtype=np.float32)
        states, order = [], []
        for length in sorted({len(row) for row in rows}):
            places = [i for i, row in enumerate(rows) if len(row) == length]
            some = [rows[i] for i in places]
            shape = self._model["num_layers"], len(some), self._model["hidden_size"]
            zeros = np.zeros(shape, self._dtype)
            start, own = self._placed(zeros, zeros), list(range(len(some)))
            logits[places], state = self._run(some, some, start, own, fresh=True)
            states.append(state)
            order += places
        return logits, states, order

    def _run(
        self,
        rows: list[list[int]],
        new: list[list[int]],
        state: State,
        order: list[int],
        fresh: bool,
    ) -> tuple[np.ndarray, State]:
        """Feed the new tokens, [B, T], with which the rows end; scores [B, V], the next state.
        `order` says which row of the state each goes on from."""
        binding = self._binding
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        binding.bind_cpu_input("input_ids", np.array(new, dtype=np.int64))
        if self.prefix_embeds is not None:
            e = self.prefix_embeds(rows, len(new[0]) if self._per_token else 1)
            e = e if self._per_token else np.ascontiguousarray(e[:, 0])
            binding.bind_cpu_input("prefix_embeds", e)
        if self._reorders:
            binding.bind_cpu_input("rows", np.array(order, dtype=np.int64))
        if self._early:
            binding.bind_cpu_input("fresh", np.array(fresh))
        for name, value in zip(("h0", "c0"), state, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        binding.bind_output("h", self._device)
        binding.bind_output("c", self._device)
        self._session.run_with_iobinding(binding)
        scores, h, c = binding.get_outputs()
        return scores.numpy(), (h, c)

    def _placed(self, h: np.ndarray, c: np.ndarray) -> State:
        place = runtime().OrtValue.ortvalue_from_numpy
        return (
            place(np.ascontiguousarray(h), self._device),
            place(np.ascontiguousarray(c), self._device),
        )
