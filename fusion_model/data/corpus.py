"""Stage 2: sentences as token ids."""

from collections.abc import Sequence
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
