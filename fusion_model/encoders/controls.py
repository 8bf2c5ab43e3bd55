"""Controls in place of a pretrained encoder: zeros, counts, tf-idf. Nothing here needs PyTorch."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from fusion_model.encoders.inputs import EncoderInput
from fusion_model.errors import EncoderError
from fusion_model.schema import Count, read_json, write_json

BAGS = ("tfidf", "counts")


class Bag(TypedDict):
    """What `tfidf.json` or `counts.json` says."""

    vocabulary: dict[str, Count]
    idf: NotRequired[list[float]]


class ZeroEncoder:
    """Zeros: a fused model without information, with the same parameters."""

    name, pooling, content_sha256, mask_token = "zeros", "zeros", "zeros", ""

    def __init__(self, dim: int = 768, policy: str = "every") -> None:
        self.dim, self.policy = dim, policy

    @property
    def fingerprint(self) -> str:
        return f"zeros:{self.dim}"

    def inputs_from_texts(self, texts: Sequence[str]) -> list[EncoderInput]:
        return [EncoderInput()] * len(texts)

    def encode(self, inputs: Sequence[EncoderInput]) -> np.ndarray:
        return np.zeros((len(inputs), self.dim), dtype=np.float32)

    def save(self, directory: Path) -> None:
        """Nothing to keep."""


class BagEncoder:
    """Counts of the `dim` most frequent words, or their tf-idf, of length 1.

    Args:
        name: `counts` or `tfidf`.
        vocabulary: the place of each word in a vector.
        idf: inverse document frequencies, [dim], for `tfidf`.
    """

    mask_token = ""
    _words = re.compile(r"(?u)\b\w\w+\b")  # scikit-learn's

    def __init__(
        self, name: str, vocabulary: dict[str, int], idf: list[float] | None, policy: str = "every"
    ) -> None:
        self.name = self.pooling = name
        self.policy = policy
        self._saved: dict[str, Any] = {"vocabulary": dict(sorted(vocabulary.items()))}
        if idf is not None:
            self._saved["idf"] = idf
        self.dim = len(vocabulary)
        self.content_sha256 = hashlib.sha256(json.dumps(self._saved).encode()).hexdigest()

    @classmethod
    def fit(cls, name: str, sentences: Sequence[str], dim: int = 768) -> "BagEncoder":
        """Learn vocabulary and document frequencies from the training sentences."""
        from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

        tfidf = name == "tfidf"
        vectorizer = (TfidfVectorizer if tfidf else CountVectorizer)(max_features=dim)
        try:
            vectorizer.fit(sentences)
        except ValueError as error:
            raise EncoderError(f"cannot fit {name} on this text: {error}") from error
        vocabulary = {word: int(i) for word, i in vectorizer.vocabulary_.items()}
        return cls(name, vocabulary, vectorizer.idf_.tolist() if tfidf else None)

    @classmethod
    def load(cls, name: str, directory: Path, policy: str = "every") -> "BagEncoder":
        """What `save` wrote."""
        path = directory / f"{name}.json"
        try:
            saved = read_json(path, Bag)
            return cls(name, saved["vocabulary"], saved["idf"] if name == "tfidf" else None, policy)
        except (OSError, KeyError, ValueError) as error:
            raise EncoderError(
                f"cannot load the {name} encoder from {path}: {error}; train the model again"
            ) from error

    @property
    def fingerprint(self) -> str:
        return f"{self.name}:{self.content_sha256}"

    def inputs_from_texts(self, texts: Sequence[str]) -> list[EncoderInput]:
        return [EncoderInput(text=text) for text in texts]

    def encode(self, inputs: Sequence[EncoderInput]) -> np.ndarray:
        vocabulary, out = self._saved["vocabulary"], np.zeros((len(inputs), self.dim))
        for row, given in enumerate(inputs):
            for word in self._words.findall(given.text.lower()):
                if word in vocabulary:
                    out[row, vocabulary[word]] += 1
        if "idf" in self._saved:
            out *= self._saved["idf"]
            out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-300)
        return out.astype(np.float32)

    def save(self, directory: Path) -> None:
        write_json(directory / f"{self.name}.json", self._saved)
