"""What an encoder is given: items, and which of them run together.

An item is the encoder's input ids, special tokens included, as little-endian int32 bytes; for
pooling `static` alone, which reads nothing else, the last token only. Batches hold items of one
length, so there is neither padding nor a mask. Nothing here needs PyTorch.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fusion_model.errors import EncoderError

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

POOLINGS = ("cls", "mean", "pooler", "last", "sep", "mask", "static")


def parse_pooling(pooling: str) -> tuple[str, ...]:
    """`static+mean` -> ("static", "mean").

    Raises:
        EncoderError: a pooling that does not exist.
    """
    parts = tuple(pooling.split("+"))
    for part in parts:
        if part not in POOLINGS:
            raise EncoderError(
                f"unknown pooling {part!r}: choose from {', '.join(POOLINGS)}, or join some: "
                "static+mean"
            )
    return parts


class TokenItems:
    """Texts, or an encoder's own token ids, as items.

    Args:
        name: the encoder's, for messages.
        tokenizer: called with texts it gives their `input_ids`, special tokens included.
        pooling: see `POOLINGS`.
        window: most tokens that the encoder reads.

    Raises:
        EncoderError: the tokenizer adds no special tokens.
    """

    def __init__(self, name: str, tokenizer: Any, pooling: str, window: int) -> None:
        self.name, self.tokenizer, self.pooling, self.window = name, tokenizer, pooling, window
        self.poolings = parse_pooling(pooling)
        self.mask_token = tokenizer.mask_token or ""
        empty = tokenizer([""])["input_ids"][0]
        filled = tokenizer(["a"])["input_ids"][0]
        self._before = next((i for i, t in enumerate(empty) if filled[i] != t), len(empty))
        self._before = min(self._before, len(empty) - 1)
        self.specials, self._after = empty, len(empty) - self._before
        if not empty or filled[: self._before] != empty[: self._before]:
            raise EncoderError(
                f"{name} adds no special tokens, so the empty prefix has no embedding: use an "
                "encoder such as BERT, RoBERTa or MiniLM"
            )

    def items_from_texts(self, texts: Sequence[str]) -> list[bytes]:
        """Tokenise; a text longer than the encoder's window is refused."""
        if not texts:
            return []
        ids = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return [self._item(i, text) for i, text in zip(ids, texts, strict=True)]

    def items_from_ids(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        """Items from the encoder's own token ids, special tokens not included."""
        before, after = self.specials[: self._before], self.specials[self._before :]
        return [self._item([*before, *ids, *after]) for ids in sequences]

    def _item(self, ids: Sequence[int], text: str | None = None) -> bytes:
        room = self.window - ("mask" in self.poolings)
        if len(ids) > room:
            shown = "" if text is None else f", starting {text[:40]!r}"
            raise EncoderError(
                f"a prefix of {len(ids)} encoder tokens does not fit the window of {room} of "
                f"{self.name}{shown}: split the sentence, or cut it with --max-tokens"
            )
        if self.poolings == ("static",):
            ids = [ids[len(ids) - self._after - 1]]
        return np.asarray(ids, dtype="<i4").tobytes()


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
