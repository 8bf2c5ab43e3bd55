"""Stage 6: a tokenised corpus, the store rows of its positions, and batches of both.

A sentence `BOS x1 … xn EOS` has n + 2 tokens and n + 1 positions: the last token predicts
nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fusion_model.encoders import Encoder, Progress
from fusion_model.hf_encoder import HFEncoder
from fusion_model.prefixes import prefix_texts, view_ids, view_texts
from fusion_model.store import Vectors, digest
from fusion_model.text import Document
from fusion_model.tokenizer import encode_sentences, encoder_ids

POSITIONS_PER_CHUNK = 65_536  # encoded and committed at once


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
        tokenizer: PreTrainedTokenizerBase,
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


@dataclass(frozen=True)
class Batch:
    """Sentences padded on the right.

    Attributes:
        input_ids: [B, T].
        lengths: real tokens of each, [B].
        prefix_embeds: [B, T - 1, E] float32, or None.
    """

    input_ids: Tensor
    lengths: Tensor
    prefix_embeds: Tensor | None

    def to(self, device: torch.device | str) -> "Batch":
        e = self.prefix_embeds
        return Batch(
            self.input_ids.to(device),
            self.lengths.to(device),
            None if e is None else e.to(device),
        )


class PrefixPlanner:
    """Which items the encoder needs for the positions of sentences.

    Args:
        encoder: where the items go.
        tokenizer: the language model's.
        view: one of `fusion_model.prefixes.VIEWS`.
        shares_vocabulary: the tokenizer was cut from the encoder's vocabulary.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: PreTrainedTokenizerBase,
        view: str = "prefix",
        shares_vocabulary: bool = False,
    ) -> None:
        self.encoder, self.tokenizer, self.view = encoder, tokenizer, view
        self.special_ids = sorted(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
        self._map: np.ndarray | None = None
        if shares_vocabulary and isinstance(encoder, HFEncoder):
            self._map = encoder_ids(tokenizer, encoder.tokenizer)

    def items(
        self, sentences: Sequence[Sequence[int]], previous: Sequence[Sequence[int]] | None = None
    ) -> list[bytes]:
        """Items of all positions, sentence after sentence.

        Args:
            sentences: token ids; special tokens are left out of what the encoder sees. n tokens
                of text give n + 1 items.
            previous: the sentence before each, for the view `previous`.
        """
        if previous is None:
            previous = [()] * len(sentences)
        pairs = zip(map(self._content, sentences), map(self._content, previous), strict=True)
        if self._map is not None:
            assert isinstance(self.encoder, HFEncoder)
            mask_id, to_encoder = self.encoder.tokenizer.mask_token_id, self._map
            return self.encoder.items_from_ids(
                [
                    ids
                    for now, before in pairs
                    for ids in view_ids(
                        to_encoder[now].tolist(), self.view, mask_id, to_encoder[before].tolist()
                    )
                ]
            )
        texts = []
        for now, before in pairs:
            earlier = str(self.tokenizer.decode(before)) if self.view == "previous" else ""
            own = prefix_texts(self.tokenizer, now)
            texts += view_texts(own, self.view, self.encoder.mask_token, earlier)
        unique = list(dict.fromkeys(texts))
        known = dict(zip(unique, self.encoder.items_from_texts(unique), strict=True))
        return [known[text] for text in texts]

    def _content(self, ids: Sequence[int]) -> list[int]:
        return [int(i) for i in ids if int(i) not in self.special_ids]


def embed_corpus(
    corpus: Corpus, planner: PrefixPlanner, store: Vectors, progress: Progress | None = None
) -> np.ndarray:
    """Encode what the store lacks, and return the store row of every position, [P] int64.

    Duplicates across the corpus run once. Each chunk is committed as it is done, so an
    interrupted job goes on where it stopped.
    """
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

            store.append(list(new), planner.encoder.encode(list(new.values()), report))
        rows[done : done + size] = [store.row(key) for key in keys]
        done, first = done + size, last
        if progress:
            progress(done, total)
    return rows


class BatchSource:
    """Batches of a corpus with the embeddings of its positions.

    Args:
        corpus: the sentences.
        rows: store row of every position, [P]; None for an unfused model.
        store: where the vectors are.
        pad_token_id: fills `input_ids` on the right.
    """

    def __init__(
        self, corpus: Corpus, rows: np.ndarray | None, store: Vectors | None, pad_token_id: int
    ) -> None:
        self.corpus, self._rows, self._store, self._pad = corpus, rows, store, pad_token_id
        self.lengths = np.array([len(s) for s in corpus.sentences])
        self._offsets = np.concatenate([[0], np.cumsum(self.lengths - 1)])

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The sentences of these indices, in this order."""
        lengths = self.lengths[indices]
        ids = np.full((len(indices), lengths.max()), self._pad, dtype=np.int64)
        for row, index in enumerate(indices):
            ids[row, : lengths[row]] = self.corpus.sentences[index]
        embeds = None
        if self._rows is not None and self._store is not None:
            where = np.zeros((len(indices), lengths.max() - 1), dtype=np.int64)
            for row, index in enumerate(indices):
                start, end = self._offsets[index], self._offsets[index + 1]
                where[row, : end - start] = self._rows[start:end]
            embeds = self._store.gather(where)
        return Batch(torch.from_numpy(ids), torch.from_numpy(lengths), embeds)

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
                batches.append(order[start:end])
                start = end
        if seed is not None:
            generator.shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[Batch]:
        """All sentences once, in batches for evaluation."""
        for indices in self.plan(16_384):
            yield self.batch(indices)
