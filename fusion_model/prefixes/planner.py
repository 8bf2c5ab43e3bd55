"""Which encoder inputs a text needs: one for each of its positions.

A sentence `BOS x1 … xn EOS` has n + 2 tokens and n + 1 positions: the last token predicts
nothing. Nothing here needs PyTorch: vectors are whatever encoder and store agree on.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from fusion_model.data.tokenizer import encoder_ids
from fusion_model.encoders import TextEncoder
from fusion_model.encoders.inputs import EncoderInput, TokenInputs
from fusion_model.encoders.policies import parse_policy
from fusion_model.errors import FusionLMError, TooLong
from fusion_model.prefixes.store import EmbeddingStore
from fusion_model.prefixes.views import CAUSAL_VIEWS, prefix_texts, shown

LARGEST = 4  # tokens of the language model that a token of the encoder's window may stand for


class PrefixPlanner:
    """The encoder inputs of the positions of sentences.

    Args:
        encoder: where they go; it knows the policy.
        tokenizer: the language model's.
        view: one of `fusion_model.prefixes.views.VIEWS`.
        shares_vocabulary: the tokenizer was cut from the encoder's vocabulary.

    Attributes:
        to_encoder: the encoder's id of each token, [V], where they share a vocabulary.
        most: tokens that a window may hold.
        outgrown: tokens of the sentences that outgrew the encoder's window.

    Raises:
        FusionLMError: a policy that does not go with the view.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        tokenizer: Any,
        view: str = "prefix",
        shares_vocabulary: bool = False,
    ) -> None:
        self.encoder, self.tokenizer, self.view = encoder, tokenizer, view
        self.policy = parse_policy(encoder.policy)
        if view != "prefix" and self.policy.name != "every":
            raise FusionLMError(
                f"policy {encoder.policy!r} goes with view 'prefix' only, not with {view!r}"
            )
        self.outgrown: list[list[int]] = []
        self.most = LARGEST * getattr(encoder, "window", math.inf)
        self.special_ids = sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
        self.to_encoder: np.ndarray | None = None
        if shares_vocabulary and isinstance(encoder, TokenInputs):
            self.to_encoder = encoder_ids(tokenizer, encoder.tokenizer)

    @property
    def reads_previous(self) -> bool:
        """Whether a sentence's embeddings depend on the sentence before."""
        return self.view == "previous" or self.policy.name == "sentence"

    def open_store(
        self, path: Path | str, dtype: str | None = None, writable: bool = True
    ) -> EmbeddingStore:
        """The store of these vectors, see there."""
        kind = self.encoder.fingerprint, self.view, self.encoder.dim, self.encoder.policy
        return EmbeddingStore(path, *kind, dtype=dtype, writable=writable)

    def inputs(
        self, sentences: Sequence[Sequence[int]], previous: Sequence[Sequence[int]] | None = None
    ) -> list[EncoderInput]:
        """Inputs of all positions, sentence after sentence.

        Args:
            sentences: token ids; special tokens are left out of what the encoder sees. n tokens
                of text give n + 1 inputs.
            previous: the sentence before each, for view and policy of that name.
        """
        contents = [self._content(ids) for ids in sentences]
        before = [self._content(ids) for ids in previous or [()] * len(sentences)]
        if self.view != "prefix" or all(len(ids) <= self.most for ids in contents):
            try:
                return self._inputs(contents, before)
            except TooLong:
                if self.view != "prefix":
                    raise
        return list(chain.from_iterable(map(self._in_windows, contents, before)))

    def _in_windows(self, content: list[int], previous: list[int]) -> list[EncoderInput]:
        """The inputs of one sentence. Where its prefix outgrows the encoder's window, the next one
        begins half a window before: no position sees what follows it."""
        assert isinstance(self.encoder, TokenInputs)
        while not self._fits([], previous):
            previous = previous[(len(previous) + 1) // 2 :]
        found: list[EncoderInput] = []
        start = 0
        while len(found) <= len(content):
            rest = content[start : start + int(self.most)]
            lengths = range(len(rest) + 1)
            size = bisect_left(lengths, True, key=lambda n: not self._fits(rest[:n], previous)) - 1
            new = self._inputs([rest[:size]], [previous])[len(found) - start :]
            if not new and start == len(found) - 1:
                self._inputs([rest[:1]], [previous])  # not even one token: raises
            found += new
            start = len(found) - 1 - (size // 2 if new else 0)
            if len(new) < len(found) == len(content) + 1:
                self.outgrown.append(content)
        return found

    def _fits(self, content: list[int], previous: list[int]) -> bool:
        try:
            self._inputs([content], [previous])
        except TooLong:
            return False
        return True

    def _inputs(
        self, contents: Sequence[list[int]], before: Sequence[list[int]]
    ) -> list[EncoderInput]:
        own = self._exact_inputs(contents, before, self.view)
        if self.policy.name == "every":
            return own
        contexts: list[EncoderInput] = []
        if self.policy.name == "sentence":
            contexts = self._exact_inputs([[]] * len(before), before, "previous")
        found: list[EncoderInput] = []
        for number, ids in enumerate(contents):
            mine = own[len(found) : len(found) + len(ids) + 1]
            if contexts:
                anchors = [contexts[number]] * len(mine)
            else:
                anchors = [mine[t] for t in self._anchors(ids)]
            found += map(self.of_policy, anchors, mine)
        return found

    def last_inputs(self, ids: Sequence[int], start: int) -> list[EncoderInput]:
        """The inputs of one sentence's positions from `start` on, from the end if negative.

        The same as the last of `inputs([ids])`, without making the others.
        """
        content = self._content(ids)
        positions = range(len(content) + 1)[start:]
        anchors = self._anchors(content)
        needed = sorted({*positions, *(anchors[t] for t in positions)})
        few = len(needed) <= len(content) <= self.most
        if self.view == "prefix" and self.policy.name != "sentence" and few:
            with suppress(TooLong):
                known = dict(zip(needed, self._of_lengths(content, needed), strict=True))
                return [self.of_policy(known[anchors[t]], known[t]) for t in positions]
        return self.inputs([ids])[start:]

    def _of_lengths(self, content: list[int], lengths: Sequence[int]) -> Sequence[EncoderInput]:
        """Exact inputs of a text's first tokens, so many each time."""
        if self.to_encoder is not None:
            assert isinstance(self.encoder, TokenInputs)
            ids = self.to_encoder[content].tolist()
            return self.encoder.inputs_from_ids([ids[:t] for t in lengths])
        texts = [str(self.tokenizer.decode(content[:t])).rstrip("�").strip() for t in lengths]
        return self.encoder.inputs_from_texts(texts)

    def of_policy(self, anchor: EncoderInput, own: EncoderInput) -> EncoderInput:
        """The input of a position, from the exact ones of its anchor and of its own text."""
        if not isinstance(self.encoder, TokenInputs):
            return anchor
        if self.policy.name == "incremental":
            return self.encoder.incremental_input(anchor if self.policy.k else None, own)
        return self.encoder.reused_input(anchor, own)

    def _anchors(self, content: Sequence[int]) -> list[int]:
        if self.policy.name != "word":
            return self.policy.anchors([True] * len(content))
        pieces = self.tokenizer.convert_ids_to_tokens(list(content))
        if self.to_encoder is not None:  # word pieces
            return self.policy.anchors([not piece.startswith("##") for piece in pieces])
        space = "\u0120"  # of byte-level BPE
        return self.policy.anchors(
            [t == 0 or p[0] == space or not p[0].isalnum() for t, p in enumerate(pieces)]
        )

    def _exact_inputs(
        self, contents: Sequence[list[int]], previous: Sequence[list[int]], view: str
    ) -> list[EncoderInput]:
        """Inputs of each position's own text under a view."""
        pairs = zip(contents, previous, strict=True)
        if (to_encoder := self.to_encoder) is not None:
            assert isinstance(self.encoder, TokenInputs)
            mask = self.encoder.tokenizer.mask_token_id
            if view == "masked" and mask is None:
                raise FusionLMError("view 'masked' needs an encoder with a mask token")
            of_texts: list[list[int]] = []
            for now, before in pairs:
                ids = to_encoder[now].tolist()
                prefixes, earlier = [ids[:t] for t in range(len(ids) + 1)], to_encoder[before]
                of_texts += shown(prefixes, view, earlier.tolist(), lambda a, b: [*a, mask, *b])
            return self.encoder.inputs_from_ids(of_texts)
        texts: list[str] = []
        for now, before in pairs:
            earlier_text = str(self.tokenizer.decode(before)) if view == "previous" else ""
            own = prefix_texts(self.tokenizer, now)
            texts += shown(own, view, earlier_text, self._masked)
        texts = [text.strip() for text in texts]
        unique = list(dict.fromkeys(texts))
        known = dict(zip(unique, self.encoder.inputs_from_texts(unique), strict=True))
        return [known[text] for text in texts]

    def _masked(self, before: str, after: str) -> str:
        return f"{before.strip()} {self.encoder.mask_token}{after}"

    def _content(self, ids: Sequence[int]) -> list[int]:
        return [int(i) for i in ids if int(i) not in self.special_ids]


def check_causal(planner: PrefixPlanner | None) -> None:
    """Raise `FusionLMError` if a model of this planner cannot generate."""
    if planner is not None and planner.view not in CAUSAL_VIEWS:
        raise FusionLMError(
            f"view {planner.view!r} sees the future: this model can score whole "
            "sentences and cannot generate"
        )
