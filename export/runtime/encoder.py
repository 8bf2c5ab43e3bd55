"""Encoders of an export: the ONNX graph of a pretrained one, or those that need none.

Nothing here needs PyTorch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fusion_model.export.manifest import ENCODER, ENCODER_TOKENIZER
from fusion_model.export.runtime.session import open_session
from fusion_model.export.runtime.tokenizer import TextTokenizer
from fusion_model.export.runtime.trees import TreeEncoder

from fusion_model.encoders import TextEncoder
from fusion_model.encoders.batching import equal_lengths
from fusion_model.encoders.controls import BagEncoder, ZeroEncoder
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


def open_encoder(folder: Path, manifest: dict[str, Any], device: str, threads: int) -> TextEncoder:
    """The encoder of an export.

    Raises:
        ExportError: the model was exported without it.
    """
    described, name = manifest["encoder"], manifest["model"].get("encoder")
    if described is None:
        raise ExportError(
            f"{folder} was exported without its encoder ({name}): export again with --encoder, or "
            "pass prefix embeddings to token_log_probs"
        )
    policy = described.get("policy", "every")
    if described["kind"] == "zeros":
        return ZeroEncoder(described["dim"], policy)
    if described["kind"] == "bag":
        return BagEncoder.load(name, folder, policy)
    kind = TreeEncoder if described["kind"] == "trees" else OnnxEncoder
    return kind(folder, described, device, threads)
