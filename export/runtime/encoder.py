"""Encoders of an export: the ONNX graph of a pretrained one, bags of words, zeros.

Nothing here needs PyTorch.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fusion_model.export.manifest import ENCODER, ENCODER_TOKENIZER
from fusion_model.export.runtime.session import open_session
from fusion_model.export.runtime.tokenizer import TextTokenizer

from fusion_model.encoders import TextEncoder
from fusion_model.encoders.batching import equal_lengths
from fusion_model.encoders.inputs import EncoderInput, OnProgress, TokenInputs
from fusion_model.errors import EncoderError, ExportError

TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 65536}


class OnnxEncoder(TokenInputs):
    """`encoder.onnx` of an export.

    Args:
        folder: of the export.
        described: the manifest's part on the encoder.
        device, threads: see `fusion_model.export.runtime.session.open_session`.
    """

    def __init__(self, folder: Path, described: dict[str, Any], device: str, threads: int) -> None:
        tokenizer = TextTokenizer(folder / ENCODER_TOKENIZER, described["tokenizer"])
        super().__init__(
            described["name"],
            tokenizer,
            described["pooling"],
            described["window"],
            described.get("policy", "every"),
        )
        self.dim: int = described["dim"]
        self.content_sha256: str = described["content_sha256"]
        self._budget = TOKENS_PER_BATCH[device]
        self._session = open_session(folder / ENCODER, device, threads)

    @property
    def fingerprint(self) -> str:
        """Content, pooling and precision, as `HFEncoder` has it."""
        return f"hf:{self.content_sha256}:{self.pooling}:float32"

    def encode(
        self, inputs: Sequence[EncoderInput], progress: OnProgress | None = None
    ) -> np.ndarray:
        """Vectors, [N, dim] float32, in the order of `inputs`."""
        places = {given: i for i, given in enumerate(dict.fromkeys(inputs))}
        out = np.empty((len(places), self.dim), dtype=np.float32)
        done = 0
        for rows, ids in equal_lengths([given.to_bytes() for given in places], self._budget):
            (out[rows],) = self._session.run(["prefix_embeds"], {"input_ids": ids})
            done += len(rows)
            if progress:
                progress(done, len(places))
        if not np.isfinite(out).all():
            raise EncoderError(f"{self.name} gave NaN or infinity: export its model again")
        return out[[places[given] for given in inputs]]


class ZeroVectors:
    """`fusion_model.encoders.controls.ZeroEncoder` without PyTorch."""

    mask_token, fingerprint = "", "zeros"

    def __init__(self, dim: int, policy: str = "every") -> None:
        self.dim, self.policy = dim, policy

    def inputs_from_texts(self, texts: Sequence[str]) -> list[EncoderInput]:
        """One input for all texts."""
        return [EncoderInput()] * len(texts)

    def encode(
        self, inputs: Sequence[EncoderInput], progress: OnProgress | None = None
    ) -> np.ndarray:
        """Zeros, [N, dim] float32."""
        return np.zeros((len(inputs), self.dim), dtype=np.float32)


class BagVectors:
    """A bag of words without scikit-learn: counts, or tf-idf of length 1.

    Args:
        path: the JSON file that `BagEncoder.save` wrote.
    """

    mask_token = ""
    _words = re.compile(r"(?u)\b\w\w+\b")  # scikit-learn's

    def __init__(self, path: Path, policy: str = "every") -> None:
        self.policy = policy
        saved = json.loads(path.read_text(encoding="utf-8"))
        self.fingerprint = path.stem
        self._vocabulary: dict[str, int] = saved["vocabulary"]
        self._idf = np.array(saved["idf"]) if "idf" in saved else None
        self.dim = len(self._vocabulary)

    def inputs_from_texts(self, texts: Sequence[str]) -> list[EncoderInput]:
        """The texts themselves."""
        return [EncoderInput(text=text) for text in texts]

    def encode(
        self, inputs: Sequence[EncoderInput], progress: OnProgress | None = None
    ) -> np.ndarray:
        """Vectors, [N, dim] float32."""
        out = np.zeros((len(inputs), self.dim))
        for row, given in enumerate(inputs):
            for word, count in Counter(self._words.findall(given.text.lower())).items():
                if word in self._vocabulary:
                    out[row, self._vocabulary[word]] = count
        if self._idf is not None:
            out *= self._idf
            out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-300)
        return out.astype(np.float32)


def open_encoder(folder: Path, manifest: dict[str, Any], device: str, threads: int) -> TextEncoder:
    """The encoder of an export.

    Raises:
        ExportError: the model was exported without it.
    """
    described, name = manifest["encoder"], manifest["model"]["encoder"]
    if described is None:
        raise ExportError(
            f"{folder} was exported without its encoder ({name}): export again with --encoder, or "
            "pass prefix embeddings to token_log_probs"
        )
    policy = described.get("policy", "every")
    if described["kind"] == "zeros":
        return ZeroVectors(described["dim"], policy)
    if described["kind"] == "bag":
        return BagVectors(folder / f"{name}.json", policy)
    return OnnxEncoder(folder, described, device, threads)
