"""Which items a text needs, and which sentences run together.

A sentence `BOS x1 … xn EOS` has n + 2 tokens and n + 1 positions: the last token predicts
nothing. Nothing here needs PyTorch: vectors are whatever encoder and store agree on.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fusion_model.errors import FusionLMError
from fusion_model.items import Progress, TokenItems
from fusion_model.policies import parse_policy
from fusion_model.prefixes import CAUSAL_VIEWS, prefix_texts, view_ids, view_texts
from fusion_model.text import Document
from fusion_model.tokenizer import encode_sentences, encoder_ids

KEY_BYTES = 16
ROWS = 16  # a batch of a multiple of these is not padded for the matrix units
POSITIONS_PER_CHUNK = 65_536  # encoded and committed at once


def digest(item: bytes) -> bytes:
    """The key of an item, 16 bytes."""
    return hashlib.blake2b(item, digest_size=KEY_BYTES).digest()


class TextEncoder(Protocol):
    """What planning needs of an encoder; see `fusion_model.encoders.Encoder`."""

    dim: int
    mask_token: str
    policy: str

    @property
    def fingerprint(self) -> str:
        """Equal where vectors of equal items are equal."""

    def items_from_texts(self, texts: Sequence[str]) -> list[bytes]:
        """One item a text."""

    def encode(self, items: Sequence[bytes], progress: Progress | None = None) -> Any:
        """Vectors, [len(items), dim] float32, a tensor or an array."""


class KeyedRows(Protocol):
    """What planning needs of a store; see `fusion_model.store.Vectors`."""

    def row(self, key: bytes) -> int:
        """Row of a key, -1 where there is none."""

    def append(self, keys: Sequence[bytes], vectors: Any) -> None:
        """Add rows, [len(keys), dim]."""


@dataclass(frozen=True)
class Corpus:
    """Sentences as token ids, `BOS … EOS`, in reading order.

    Attributes:
        sentences: ids of each sentence.
        starts_document: true where no sentence precedes.
        characters: characters of the text, for bits per character.
    """

    sentences: list[list[int]]
    starts_document: list[bool]
    characters: int

    @classmethod
    def from_documents(
        cls,
        documents: Sequence[Document],
        tokenizer: Any,
        max_tokens: int | None = None,
    ) -> "Corpus":
        """Tokenise; sentences of over `max_tokens` tokens are cut into several."""
        sentences: list[list[int]] = []
        starts: list[bool] = []
        for document in documents:
            encoded = encode_sentences(tokenizer, document.sentences, max_tokens)
            sentences += encoded
            starts += [i == 0 for i in range(len(encoded))]
        characters = sum(len(s) for d in documents for s in d.sentences)
        return cls(sentences, starts, characters)

    @property
    def positions(self) -> list[int]:
        """Number of predictions of each sentence."""
        return [len(s) - 1 for s in self.sentences]


class PrefixPlanner:
    """Which items the encoder needs for the positions of sentences.

    Args:
        encoder: where the items go; it knows the policy.
        tokenizer: the language model's.
        view: one of `fusion_model.prefixes.VIEWS`.
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


def embed_corpus(
    corpus: Corpus,
    planner: PrefixPlanner,
    store: KeyedRows,
    progress: Progress | None = None,
    encode: Callable[..., Any] | None = None,
) -> np.ndarray:
    """Encode what the store lacks, and return the store row of every position, [P] int64.

    Duplicates across the corpus run once. Each chunk is committed as it is done, so an
    interrupted job goes on where it stopped.

    Args:
        encode: in place of the encoder's own, see `fusion_model.sharding`.
    """
    encode = encode or planner.encoder.encode
    positions = corpus.positions
    total = sum(positions)
    rows = np.empty(total, dtype=np.int64)
    done = first = 0
    while first < len(corpus.sentences):
        last, size = first, 0
        while last < len(corpus.sentences) and (size == 0 or size < POSITIONS_PER_CHUNK):
            size += positions[last]
            last += 1
        previous: list[Sequence[int]] = [
            () if corpus.starts_document[i] else corpus.sentences[i - 1] for i in range(first, last)
        ]
        items = planner.items(corpus.sentences[first:last], previous)
        keys = [digest(item) for item in items]
        new = {k: item for k, item in zip(keys, items, strict=True) if store.row(k) < 0}
        if new:
            base = done

            def report(encoded: int, of: int, base: int = base, size: int = size) -> None:
                if progress:
                    progress(base + size * encoded // of, total)

            store.append(list(new), encode(list(new.values()), report))
        rows[done : done + size] = [store.row(key) for key in keys]
        done, first = done + size, last
        if progress:
            progress(done, total)
    return rows


class Batching:
    """The sentences of a corpus as padded arrays.

    Args:
        corpus: the sentences.
        rows: store row of every position, [P]; None for an unfused model.
        pad_token_id: fills the ids on the right.
    """

    def __init__(self, corpus: Corpus, rows: np.ndarray | None, pad_token_id: int) -> None:
        self.corpus, self._rows, self._pad = corpus, rows, pad_token_id
        self.lengths = np.array([len(s) for s in corpus.sentences])
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths - 1)])

    def padded(
        self, indices: Sequence[int] | np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Ids [B, T] int64, lengths [B], and store rows [B, T - 1] of the sentences."""
        lengths = self.lengths[indices]
        ids = np.full((len(indices), lengths.max()), self._pad, dtype=np.int64)
        for row, index in enumerate(indices):
            ids[row, : lengths[row]] = self.corpus.sentences[index]
        if self._rows is None:
            return ids, lengths, None
        where = np.zeros((len(indices), lengths.max() - 1), dtype=np.int64)
        for row, index in enumerate(indices):
            start, end = self._offsets[index], self._offsets[index + 1]
            where[row, : end - start] = self._rows[start:end]
        return ids, lengths, where

    def plan(
        self, tokens_per_batch: int, seed: int | None = None, least: int = 1
    ) -> list[np.ndarray]:
        """Sentence indices of each batch: similar lengths together, padded size within budget.

        Args:
            tokens_per_batch: most padded tokens a batch holds (one sentence may exceed it).
            seed: shuffles; None keeps a fixed order, shortest first.
            least: fewest sentences a batch holds, where the corpus allows.
        """
        order = np.arange(len(self.lengths))
        generator = np.random.default_rng(seed)
        if seed is not None:
            order = generator.permutation(order)
        order = order[np.argsort(self.lengths[order], kind="stable")]
        batches, start = [], 0
        for end in range(1, len(order) + 1):
            full = (
                end == len(order) or (end + 1 - start) * self.lengths[order[end]] > tokens_per_batch
            )
            if full and (end - start >= least or end == len(order)):
                rows = end - start
                if rows > 2 * max(ROWS, least) and end < len(order):
                    rows -= rows % ROWS
                batches.append(order[start : start + rows])
                start += rows
        if seed is not None:
            generator.shuffle(batches)
        return batches
