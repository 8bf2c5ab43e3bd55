"""What an encoder is given: items, and which of them run together.

An item is the encoder's input ids, special tokens included, as little-endian int32 bytes; for
pooling `static` alone, which reads nothing else, the last token only. Two policies have items of
their own, see `TokenItems.held` and `TokenItems.grown`. Nothing here needs PyTorch.
"""

import re
import warnings
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from fusion_model.encoders.policies import HOLDING, parse_policy
from fusion_model.encoders.pooling import Pooling, parse_pooling
from fusion_model.errors import EncoderError

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

TRIED = 256  # texts of a call
ENOUGH = 8  # of the first calls together
WORD = re.compile(r"\s*\S+")


class TokenItems:
    """Texts, or an encoder's own token ids, as items.

    Args:
        name: the encoder's, for messages.
        tokenizer: called with texts it gives their `input_ids`, special tokens included.
        pooling: see `POOLINGS`.
        window: most tokens that the encoder reads.
        policy: see `fusion_model.encoders.policies`.

    Raises:
        EncoderError: the tokenizer adds no special tokens.
    """

    def __init__(
        self, name: str, tokenizer: Any, pooling: str, window: int, policy: str = "every"
    ) -> None:
        self.name, self.tokenizer, self.pooling, self.window = name, tokenizer, pooling, window
        self.poolings, self.policy = parse_pooling(pooling), policy
        joined = Pooling("static") in self.poolings and len(set(self.poolings)) > 1
        self.holds = joined and parse_policy(policy).name in HOLDING
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
        self._pieces: dict[str, bytes] = {}  # ids of words
        self._by_word: bool | None = None  # until it was tried
        self._agreed = 0  # texts of more than a word, so far

    def items_from_texts(self, texts: Sequence[str]) -> list[bytes]:
        """Tokenise; a text longer than the encoder's window is refused."""
        if not texts:
            return []
        return [self._checked(ids, text) for ids, text in zip(self._ids(texts), texts, strict=True)]

    def _ids(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of texts, special tokens included; each word is tokenised once, where that is all
        the tokenizer does: some of the first texts are tried both ways."""
        if self._by_word is None:
            some = texts[:: max(len(texts) // TRIED, 1)]
            whole = self._tokenized(some)
            agrees = self._joined(some) == whole
            self._agreed += sum(len(WORD.findall(text)) > 1 for text in some)
            if not agrees:
                self._by_word = False
                warnings.warn(
                    f"the tokenizer of {self.name} does not go word by word: texts are tokenised "
                    "whole, which takes longer",
                    stacklevel=2,
                )
            elif self._agreed >= ENOUGH:
                self._by_word = True
        return self._joined(texts) if self._by_word else self._tokenized(texts)

    def _tokenized(self, texts: Sequence[str]) -> list[bytes]:
        found = self.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
        return [_bytes(ids) for ids in found]

    def _joined(self, texts: Sequence[str]) -> list[bytes]:
        known, before, after = self._pieces, 4 * self._before, 4 * self._after
        split = [WORD.findall(text) for text in texts]
        new = list(set(chain.from_iterable(split)) - known.keys())
        if len(known) + len(new) > 1_000_000:
            known.clear()
            new = list(set(chain.from_iterable(split)))
        if new:
            for word, ids in zip(new, self._tokenized(new), strict=True):
                known[word] = ids[before : len(ids) - after]
        specials = _bytes(self.specials)
        first, last = specials[:before], specials[before:]
        return [b"".join([first, *map(known.__getitem__, words), last]) for words in split]

    def items_from_ids(self, sequences: Sequence[Sequence[int]]) -> list[bytes]:
        """Items from the encoder's own token ids, special tokens not included."""
        before, after = self.specials[: self._before], self.specials[self._before :]
        return [self._checked(_bytes([*before, *ids, *after])) for ids in sequences]

    def held(self, context: bytes, own: bytes) -> bytes:
        """The item whose vectors are those of `context`, but `static` of the text of `own`.

        With `static` among other poolings it is the context's ids and the last of the text's.
        """
        if not self.holds:
            return own if self.poolings == (Pooling("static"),) else context
        end = max(len(own) - 4 * (self._after + 1), 0)
        return context + own[end : end + 4]

    def grown(self, anchor: bytes | None, own: bytes) -> bytes:
        """The item of an exact encoding, continued token by token.

        It is the number of tokens that are encoded exactly, and the text's ids without special
        tokens. What the texts of both items begin with is encoded exactly: all of the anchor,
        unless a word that was cut there is now split otherwise.

        Args:
            anchor: None for the empty text.
        """
        if self.poolings == (Pooling("static"),):
            return own
        if anchor is None:
            return b"\0\0\0\0" + own[4 * self._before : len(own) - 4 * self._after]
        ids = self._content(own)
        first = self._content(anchor)
        shorter = min(len(first), len(ids))
        same = first[:shorter] == ids[:shorter]
        common = shorter if same.all() else int(same.argmin())
        return np.concatenate([[common], ids]).astype("<i4").tobytes()

    def _content(self, item: bytes) -> np.ndarray:
        ids = np.frombuffer(item, dtype="<i4")
        return ids[self._before : len(ids) - self._after]

    def _checked(self, ids: bytes, text: str | None = None) -> bytes:
        """The item of a text's ids, special tokens included, if they fit the window."""
        room, size = self.window - any(p.name == "mask" for p in self.poolings), len(ids) // 4
        if size > room:
            shown = "" if text is None else f", starting {text[:40]!r}"
            raise EncoderError(
                f"a prefix of {size} encoder tokens does not fit the window of {room} of "
                f"{self.name}{shown}: split the sentence, or cut it with --max-tokens"
            )
        if self.poolings == (Pooling("static"),):
            last = 4 * (size - self._after - 1)
            return ids[last : last + 4]
        return ids


def _bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<i4").tobytes()
