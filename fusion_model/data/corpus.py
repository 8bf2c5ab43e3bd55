"""Stage 2: sentences as token ids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fusion_model.data.text import Document
from fusion_model.data.tokenizer import encode_sentences


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

    def parts(self, positions: int) -> Iterator["Corpus"]:
        """Sentences that follow each other, with at least so many positions each, as corpora; the
        characters are not counted."""
        first = size = 0
        for last, sentence in enumerate(self.sentences, start=1):
            size += len(sentence) - 1
            if size >= positions or last == len(self.sentences):
                yield Corpus(self.sentences[first:last], self.starts_document[first:last], 0)
                first, size = last, 0
