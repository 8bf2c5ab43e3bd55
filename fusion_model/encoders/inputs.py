"""From texts to what an encoder is given. Nothing here needs PyTorch."""

import re
import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from fusion_model.encoders.incremental.trees import Query
from fusion_model.encoders.policies import HOLDING, parse_policy
from fusion_model.encoders.pooling import Pooling, parse_pooling
from fusion_model.errors import EncoderError, TooLong

TRIED = 256  # texts, and these
ODD = tuple(f"{a} {b}" for a in ("It's", "ünïted", "co-op.", "3.14%") for b in ("wasn't", "漢字"))
WORD = re.compile(r"\s*\S+")


class EncoderInput(NamedTuple):
    """What one vector is made of: equal inputs have equal vectors. Ids are little-endian int32.

    Attributes:
        ids: the encoder's ids of a text, special tokens included; without them where `exact` is
            given; none for pooling `static` alone.
        exact: policy `incremental`: so many of the ids are read all to all, special tokens around
            them, and each of the others as a continuation.
        static: the id that pooling `static` takes, where it is not that of the last token.
        text: what a bag of words counts.
    """

    ids: bytes = b""
    exact: int | None = None
    static: bytes = b""
    text: str = ""

    def to_bytes(self) -> bytes:
        """What stores on disk know the input by: it must never change."""
        count = b"" if self.exact is None else self.exact.to_bytes(4, "little")
        return count + self.ids + self.static + self.text.encode()


class TokenInputs:
    """Texts, or an encoder's own token ids, as inputs.

    Args:
        name: the encoder's, for messages.
        tokenizer: called with texts it gives their `input_ids`, special tokens included.
        pooling: see `POOLINGS`.
        window: most tokens that the encoder reads.
        policy: see `fusion_model.encoders.policies`.

    Attributes:
        specials: ids of the empty text: `before` special tokens and `after` others.

    Raises:
        EncoderError: the tokenizer adds no special tokens.
    """

    def __init__(
        self, name: str, tokenizer: Any, pooling: str, window: int, policy: str = "every"
    ) -> None:
        self.name, self.tokenizer, self.pooling, self.window = name, tokenizer, pooling, window
        self.poolings, self.policy = parse_pooling(pooling), policy
        static = Pooling("static")
        self.reads = any(p != static for p in self.poolings)  # more than the last token
        holding = parse_policy(policy).name in HOLDING
        self.holds = self.reads and static in self.poolings and holding
        self.mask_token = tokenizer.mask_token or ""
        empty = tokenizer([""])["input_ids"][0]
        filled = tokenizer(["a"])["input_ids"][0]
        self.before = next((i for i, t in enumerate(empty) if filled[i] != t), len(empty))
        self.before = min(self.before, len(empty) - 1)
        self.specials, self.after = empty, len(empty) - self.before
        if not empty or filled[: self.before] != empty[: self.before]:
            raise EncoderError(
                f"{name} adds no special tokens, so the empty prefix has no embedding: use an "
                "encoder such as BERT, RoBERTa or MiniLM"
            )
        self._pieces: dict[str, bytes] = {}  # ids of words
        self._by_word: bool | None = None  # until it was tried

    def inputs_from_texts(self, texts: Sequence[str]) -> list[EncoderInput]:
        """Tokenise; a text longer than the encoder's window is refused."""
        if not texts:
            return []
        return [self._checked(ids, text) for ids, text in zip(self._ids(texts), texts, strict=True)]

    def _ids(self, texts: Sequence[str]) -> list[bytes]:
        """Ids of texts, special tokens included; each word is tokenised once, where that is all
        the tokenizer does: some of the first texts are tried both ways."""
        if self._by_word is None:
            some = [*ODD, *texts[:: max(len(texts) // TRIED, 1)]]
            self._by_word = self._joined(some) == self._tokenized(some)
            if not self._by_word:
                warnings.warn(
                    f"the tokenizer of {self.name} does not go word by word: texts are tokenised "
                    "whole, which takes longer",
                    stacklevel=2,
                )
        return self._joined(texts) if self._by_word else self._tokenized(texts)

    def goes_by_word(self) -> bool:
        """Whether a text's ids are those of its words, one after the other."""
        if self._by_word is None:
            self._ids([])
        return bool(self._by_word)

    def pieces(self, text: str) -> bytes:
        """Ids of a text's words without special tokens, each tokenised once."""
        words = WORD.findall(text)
        if len(words) == 1 and (known := self._pieces.get(words[0])) is not None:
            return known
        return self._content(self._joined([text])[0])

    def input_of(self, content: bytes) -> EncoderInput:
        """The input of a text's ids, special tokens not included, if they fit the window."""
        specials = _bytes(self.specials)
        return self._checked(specials[: 4 * self.before] + content + specials[4 * self.before :])

    def _tokenized(self, texts: Sequence[str]) -> list[bytes]:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # written in a text, they are text
        return [_bytes(found.ids) for found in backend.encode_batch_fast(list(texts))]

    def _joined(self, texts: Sequence[str]) -> list[bytes]:
        known = self._pieces
        split = [WORD.findall(text) for text in texts]
        new = list(set(chain.from_iterable(split)) - known.keys())
        if len(known) + len(new) > 1_000_000:
            known.clear()
            new = list(set(chain.from_iterable(split)))
        if new:
            known.update(zip(new, map(self._content, self._tokenized(new)), strict=True))
        specials = _bytes(self.specials)
        first, last = specials[: 4 * self.before], specials[4 * self.before :]
        return [b"".join([first, *map(known.__getitem__, words), last]) for words in split]

    def inputs_from_ids(self, sequences: Sequence[Sequence[int]]) -> list[EncoderInput]:
        """Inputs from the encoder's own token ids, special tokens not included."""
        return [self.input_of(_bytes(ids)) for ids in sequences]

    def reused_input(self, context: EncoderInput, own: EncoderInput) -> EncoderInput:
        """What has the vectors of `context`, but `static` of the text of `own`."""
        if not self.reads:
            return own
        return context._replace(static=self.last_id(own)) if self.holds else context

    def incremental_input(self, anchor: EncoderInput | None, own: EncoderInput) -> EncoderInput:
        """What has the vectors of an exact encoding, continued token by token.

        What both texts begin with is encoded exactly: all of the anchor, unless a word that was
        cut there is now split otherwise.

        Args:
            anchor: None for the empty text.
        """
        if not self.reads:
            return own
        ids = self._content(own.ids)
        first = b"" if anchor is None else self._content(anchor.ids)
        if ids.startswith(first):
            return EncoderInput(ids, len(first) // 4)
        pairs = zip(np.frombuffer(first, "<i4"), np.frombuffer(ids, "<i4"), strict=False)
        differ = (at for at, (a, b) in enumerate(pairs) if a != b)
        return EncoderInput(ids, next(differ, len(ids) // 4))

    @property
    def queries(self) -> dict[str, Query]:
        """What reads a text in place of the nodes that only a head has."""
        first = Query(self.specials[0], at_start=True, own=0)
        end = Query(self.specials[self.before], at_start=False, own=-self.after)
        found = {"cls": first, "pooler": first, "sep": end}
        if parse_policy(self.policy).name == "incremental":
            found["mask"] = Query(self.tokenizer.mask_token_id, at_start=False, own=None)
        return found

    def split(self, given: EncoderInput) -> tuple[list[int], list[int]]:
        """The head, which is read all to all, with special tokens, and the tokens after it."""
        ids = np.frombuffer(given.ids, dtype="<i4").tolist()
        if given.exact is None:
            return ids, []
        before, after = self.specials[: self.before], self.specials[self.before :]
        return [*before, *ids[: given.exact], *after], ids[given.exact :]

    def last_id(self, given: EncoderInput) -> bytes:
        """What pooling `static` takes: a text's last token, [CLS] if it is empty."""
        if given.static:
            return given.static
        if given.exact is not None:
            return given.ids[-4:] or _bytes(self.specials[:1])
        end = max(len(given.ids) - 4 * (self.after + 1), 0)
        return given.ids[end : end + 4]

    def _content(self, ids: bytes) -> bytes:
        """Without special tokens."""
        return ids[4 * self.before : len(ids) - 4 * self.after]

    def _checked(self, ids: bytes, text: str | None = None) -> EncoderInput:
        """The input of a text's ids, special tokens included, if they fit the window."""
        room, size = self.window - any(p.name == "mask" for p in self.poolings), len(ids) // 4
        if size > room:
            shown = "" if text is None else f", starting {text[:40]!r}"
            raise TooLong(
                f"a prefix of {size} encoder tokens does not fit the window of {room} of "
                f"{self.name}{shown}: split the sentence"
            )
        found = EncoderInput(ids)
        return found if self.reads else EncoderInput(static=self.last_id(found))


def _bytes(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<i4").tobytes()
