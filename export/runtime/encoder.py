"""A pretrained encoder of an export, whole texts at once. Nothing here needs PyTorch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from fusion_model.export.manifest import ENCODER, ENCODER_TOKENIZER
from fusion_model.export.runtime.session import open_session
from fusion_model.export.runtime.tokenizer import TextTokenizer

from fusion_model.encoders.batching import equal_lengths
from fusion_model.encoders.inputs import EncoderInput, TokenInputs
from fusion_model.errors import EncoderError

Rows = Iterator[tuple[list[int], np.ndarray]]


class OnnxEncoder(TokenInputs):
    """`encoder.onnx` of an export.

    Args:
        folder: of the export.
        described: the manifest's part on the encoder.
        device, threads: see `fusion_model.export.runtime.session.open_session`.
    """

    tokens_at_once: ClassVar = {"cpu": 4096, "cuda": 65536}

    def __init__(self, folder: Path, described: dict[str, Any], device: str, threads: int) -> None:
        tokenizer = TextTokenizer(folder / ENCODER_TOKENIZER, described["tokenizer"])
        name, pooling, window = (described[key] for key in ("name", "pooling", "window"))
        super().__init__(name, tokenizer, pooling, window, described.get("policy", "every"))
        self.dim: int = described["dim"]
        self._read_width = self.dim  # of what `_batches` gives
        self.content_sha256: str = described["content_sha256"]
        self.precision: str = described.get("precision", "fp32")
        self.budget = self.tokens_at_once[device]
        self._session = open_session(folder / ENCODER, device, threads)

    @property
    def fingerprint(self) -> str:
        """Content, pooling and precision, as PyTorch's encoders have it."""
        dtype = {"fp32": "float32"}.get(self.precision, self.precision)
        return f"hf:{self.content_sha256}:{self.pooling}:{dtype}"

    def encode(self, inputs: Sequence[EncoderInput]) -> np.ndarray:
        """Vectors, [N, dim] float32, in the order of `inputs`; duplicates run once.

        Raises:
            EncoderError: NaN or infinity.
        """
        places = {given: i for i, given in enumerate(dict.fromkeys(inputs))}
        read = np.empty((len(places), self._read_width), dtype=np.float32)
        for rows, found in self._batches(list(places)):
            read[rows] = found
        out = self.with_static(list(places), read)
        if not np.isfinite(out).all():
            raise EncoderError(f"{self.name} gave NaN or infinity: export its model again")
        return out[[places[given] for given in inputs]]

    def _batches(self, inputs: Sequence[EncoderInput]) -> Rows:
        """Places of texts, and what the graph gives of them."""
        for rows, ids in equal_lengths([given.to_bytes() for given in inputs], self.budget):
            yield rows, self._session.run(["prefix_embeds"], {"input_ids": ids})[0]

    def with_static(self, inputs: Sequence[EncoderInput], read: np.ndarray) -> np.ndarray:
        """Vectors [N, dim] of what was read of texts: here `static` is in it."""
        return read
