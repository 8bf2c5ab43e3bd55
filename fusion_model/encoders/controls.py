"""Controls in place of a pretrained encoder: zeros, counts, tf-idf. Nothing here needs PyTorch."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusion_model.encoders.inputs import EncoderInput, OnProgress
from fusion_model.errors import EncoderError

BAGS = ("tfidf", "counts")


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

    def encode(
        self, inputs: Sequence[EncoderInput], progress: OnProgress | None = None
    ) -> np.ndarray:
        return np.zeros((len(inputs), self.dim), dtype=np.float32)

    def save(self, directory: Path) -> None:
        """Nothing to keep."""


class BagEncoder:
    """Bag-of-words counts or tf-idf over the `dim` most frequent words (scikit-learn)."""

    mask_token = ""

    def __init__(self, name: str, vectorizer: Any, policy: str = "every") -> None:
        self.name = self.pooling = name
        self.policy = policy
        self._vectorizer = vectorizer
        self.dim = len(vectorizer.vocabulary_)
        self.content_sha256 = hashlib.sha256(self._to_json().encode()).hexdigest()

    @classmethod
    def fit(
        cls, name: str, sentences: Sequence[str], dim: int = 768, policy: str = "every"
    ) -> "BagEncoder":
        """Learn vocabulary and document frequencies from the training sentences."""
        try:
            return cls(name, _vectorizer(name, max_features=dim).fit(sentences), policy)
        except ValueError as error:
            raise EncoderError(f"cannot fit {name} on this text: {error}") from error

    @classmethod
    def load(cls, name: str, directory: Path, policy: str = "every") -> "BagEncoder":
        """What `save` wrote."""
        path = directory / f"{name}.json"
        try:
            saved = json.loads(path.read_text())
            vectorizer = _vectorizer(name, vocabulary=saved["vocabulary"])
            if name == "tfidf":
                vectorizer.idf_ = np.array(saved["idf"])
            else:
                vectorizer._validate_vocabulary()
        except (OSError, KeyError, ValueError) as error:
            raise EncoderError(
                f"cannot load the {name} encoder from {path}: {error}; train the model again"
            ) from error
        return cls(name, vectorizer, policy)

    def _to_json(self) -> str:
        vocabulary = {word: int(i) for word, i in sorted(self._vectorizer.vocabulary_.items())}
        saved: dict[str, Any] = {"vocabulary": vocabulary}
        if self.name == "tfidf":
            saved["idf"] = self._vectorizer.idf_.tolist()
        return json.dumps(saved)

    @property
    def fingerprint(self) -> str:
        return f"{self.name}:{self.content_sha256}"

    def inputs_from_texts(self, texts: Sequence[str]) -> list[EncoderInput]:
        return [EncoderInput(text=text) for text in texts]

    def encode(
        self, inputs: Sequence[EncoderInput], progress: OnProgress | None = None
    ) -> np.ndarray:
        matrix = self._vectorizer.transform([given.text for given in inputs])
        found: np.ndarray = matrix.toarray().astype(np.float32)
        return found

    def save(self, directory: Path) -> None:
        (directory / f"{self.name}.json").write_text(self._to_json())


def _vectorizer(name: str, **options: Any) -> Any:
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

    return (TfidfVectorizer if name == "tfidf" else CountVectorizer)(**options)
