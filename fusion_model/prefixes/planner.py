"""Which items a text needs, and which sentences run together.

A sentence `BOS x1 … xn EOS` has n + 2 tokens and n + 1 positions: the last token predicts
nothing. Nothing here needs PyTorch: vectors are whatever encoder and store agree on.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusion_model.data.tokenizer import encoder_ids
from fusion_model.encoders import TextEncoder
from fusion_model.encoders.inputs import TokenItems
from fusion_model.encoders.policies import parse_policy
from fusion_model.errors import FusionLMError
from fusion_model.prefixes.views import CAUSAL_VIEWS, prefix_texts, view_ids, view_texts


class PrefixPlanner:
    """Which items the encoder needs for the positions of sentences.

    Args:
        encoder: where the items go; it knows the policy.
        tokenizer: the language model's.
        view: one of `fusion_model.prefixes.views.VIEWS`.
        shares_vocabulary: the tokenizer was cut from the encoder's vocabulary.

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
        self.special_ids = sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
        self._map: np.ndarray | None = None
        if shares_vocabulary and isinstance(encoder, TokenItems):
            self._map = encoder_ids(tokenizer, encoder.tokenizer)

    def items(
        self, sentences: Sequence[Sequence[int]], previous: Sequence[Sequence[int]] | None = None
    ) -> list[bytes]:
        """Items of all positions, sentence after sentence.

        Args:
            sentences: token ids; special tokens are left out of what the encoder sees. n tokens
                of text give n + 1 items.
            previous: the sentence before each, for view and policy of that name.
        """
        contents = [self._content(ids) for ids in sentences]
        before = [self._content(ids) for ids in previous or [()] * len(sentences)]
        own = self._exact_items(contents, before)
        if self.policy.name == "sentence":
            contexts = self._exact_items([[]] * len(before), before, "previous")
            repeated = [c for c, ids in zip(contexts, contents, strict=True) for _ in (*ids, 0)]
            return [self._held(c, item) for c, item in zip(repeated, own, strict=True)]
        if self.policy.name == "every":
            return own
        items, start = [], 0
        for ids in contents:
            mine = own[start : start + len(ids) + 1]
            items += [
                self._of_policy(mine[anchor], item)
                for anchor, item in zip(self._anchors(ids), mine, strict=True)
            ]
            start += len(mine)
        return items

    def last_items(self, ids: Sequence[int], start: int) -> list[bytes]:
        """The items of one sentence's positions from `start` on, counted from the end if negative.

        The same as the last of `items([ids])`, without making the others.
        """
        content = self._content(ids)
        positions = range(len(content) + 1)[start:]
        anchors = self._anchors(content)
        needed = sorted({*positions, *(anchors[t] for t in positions)})
        if self.view != "prefix" or self.policy.name == "sentence" or len(needed) > len(content):
            return self.items([ids])[start:]
        if self._map is not None:
            assert isinstance(self.encoder, TokenItems)
            own = self.encoder.items_from_ids([self._map[content[:t]].tolist() for t in needed])
        else:
            texts = [str(self.tokenizer.decode(content[:t])).rstrip("�").strip() for t in needed]
            own = self.encoder.items_from_texts(texts)
        known = dict(zip(needed, own, strict=True))
        return [self._of_policy(known[anchors[t]], known[t]) for t in positions]

    def _of_policy(self, anchor: bytes, own: bytes) -> bytes:
        if self.policy.name != "incremental":
            return self._held(anchor, own)
        assert isinstance(self.encoder, TokenItems)
        return self.encoder.grown(anchor if self.policy.k else None, own)

    def _held(self, context: bytes, own: bytes) -> bytes:
        if isinstance(self.encoder, TokenItems):
            return self.encoder.held(context, own)
        return context

    def _anchors(self, content: Sequence[int]) -> list[int]:
        if self.policy.name != "word":
            return self.policy.anchors([True] * len(content))
        pieces = self.tokenizer.convert_ids_to_tokens(list(content))
        if self._map is not None:  # word pieces
            return self.policy.anchors([not piece.startswith("##") for piece in pieces])
        space = "\u0120"  # of byte-level BPE
        return self.policy.anchors(
            [t == 0 or p[0] == space or not p[0].isalnum() for t, p in enumerate(pieces)]
        )

    def _exact_items(
        self,
        contents: Sequence[list[int]],
        previous: Sequence[list[int]],
        view: str | None = None,
    ) -> list[bytes]:
        """Items of each position's own text under a view (default: the planner's)."""
        view = view or self.view
        if self._map is not None:
            assert isinstance(self.encoder, TokenItems)
            mask_id, to_encoder = self.encoder.tokenizer.mask_token_id, self._map
            return self.encoder.items_from_ids(
                [
                    ids
                    for now, before in zip(contents, previous, strict=True)
                    for ids in view_ids(
                        to_encoder[now].tolist(), view, mask_id, to_encoder[before].tolist()
                    )
                ]
            )
        texts = []
        for now, before in zip(contents, previous, strict=True):
            earlier = str(self.tokenizer.decode(before)) if view == "previous" else ""
            own = prefix_texts(self.tokenizer, now)
            texts += view_texts(own, view, self.encoder.mask_token, earlier)
        unique = list(dict.fromkeys(texts))
        known = dict(zip(unique, self.encoder.items_from_texts(unique), strict=True))
        return [known[text] for text in texts]

    def _content(self, ids: Sequence[int]) -> list[int]:
        return [int(i) for i in ids if int(i) not in self.special_ids]


def check_causal(planner: PrefixPlanner | None) -> None:
    """Raise `FusionLMError` if a model of this planner cannot generate."""
    if planner is not None and planner.view not in CAUSAL_VIEWS:
        raise FusionLMError(
            f"view {planner.view!r} sees the future: this model can score whole "
            "sentences and cannot generate"
        )
