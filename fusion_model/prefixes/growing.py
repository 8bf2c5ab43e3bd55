"""Encoder inputs of texts that grow by a token: words that are done are not looked at again."""

from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

from fusion_model.encoders.inputs import EncoderInput, TokenInputs
from fusion_model.errors import TooLong
from fusion_model.prefixes.planner import PrefixPlanner


class Grown(NamedTuple):
    """A text that may go on.

    Attributes:
        ids: of the words that are done, the encoder's, little-endian int32.
        word: the language model's tokens of the word that is being written.
        tokens: the language model's, of all that the encoder is shown.
    """

    ids: bytes = b""
    word: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()


class GrowingInputs:
    """What `PrefixPlanner.inputs` finds for the last position, from that for a token less.

    Args:
        planner: one for which `can_grow` holds.
    """

    def __init__(self, planner: PrefixPlanner) -> None:
        assert isinstance(planner.encoder, TokenInputs)
        self._planner, self._encoder = planner, planner.encoder
        self._map, self._special = planner.to_encoder, set(planner.special_ids)
        decode = planner.tokenizer.decode
        self._decoded = lru_cache(4096)(lambda tokens: str(decode(list(tokens))))

    def grown(self, text: Grown, token: int) -> Grown:
        """The text with one token more: of its last part, where it outgrows the encoder's window,
        as in `PrefixPlanner.inputs`."""
        if token in self._special:
            return text
        longer = self._longer(text, token)
        if self._has_room(longer):
            return longer
        with suppress(TooLong):
            self.input(longer)
            if len(longer.tokens) <= self._planner.most:
                return longer
        self._planner.outgrown.append(list(longer.tokens))
        with suppress(TooLong):
            return self._anew(longer.tokens[-1 - len(text.tokens) // 2 :])
        return self._anew((token,))

    def _has_room(self, text: Grown) -> bool:
        """Surely, without looking closer: a byte makes two of the encoder's tokens at most."""
        encoder, word = self._encoder, len(self._decoded(text.word).encode()) if text.word else 0
        size = len(text.ids) // 4 + 2 * word + len(encoder.specials) + 1
        return size <= encoder.window and len(text.tokens) <= self._planner.most

    def _anew(self, tokens: tuple[int, ...]) -> Grown:
        """A text that fits the encoder's window all along; `TooLong` where it does not."""
        text = Grown()
        for token in tokens:
            text = self._longer(text, token)
            self.input(text)
        return text

    def _longer(self, text: Grown, token: int) -> Grown:
        tokens = (*text.tokens, token)
        if self._map is not None:
            return Grown(text.ids + self._map[token].astype("<i4").tobytes(), (), tokens)
        if text.word and self._decoded((token,))[:1].isspace():
            return Grown(self._ids(text, self._decoded(text.word)), (token,), tokens)
        return Grown(text.ids, (*text.word, token), tokens)

    def input(self, text: Grown) -> EncoderInput:
        """What the encoder is given."""
        ids = self._ids(text, self._decoded(text.word).rstrip("�")) if text.word else text.ids
        own = self._encoder.input_of(ids)
        return self._planner.of_policy(own, own)

    def _ids(self, text: Grown, end: str) -> bytes:
        return text.ids + self._encoder.pieces(end if text.ids else end.lstrip())


def can_grow(planner: PrefixPlanner) -> bool:
    """Whether the ids of a text are those of its words, one after the other, and no earlier text
    plays a part."""
    encoder, policy = planner.encoder, planner.policy
    if planner.view != "prefix" or not isinstance(encoder, TokenInputs):
        return False
    if policy.k or policy.name not in ("every", "incremental"):
        return False
    return planner.to_encoder is not None or encoder.goes_by_word()
