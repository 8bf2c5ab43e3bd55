"""Stage 4: encoders. Each turns inputs, which stand for texts, into vectors.

`inputs_from_texts` prepares texts once; equal inputs have equal vectors, so that duplicates are
dropped and results are stored by input. A `fingerprint` names everything that a vector depends on
besides the input. PyTorch is imported by those that need it, when they are loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fusion_model.encoders.controls import BAGS, BagEncoder, ZeroEncoder
from fusion_model.encoders.inputs import EncoderInput
from fusion_model.encoders.policies import AUTO, parse_policy
from fusion_model.errors import EncoderError

if TYPE_CHECKING:
    import torch


class TextEncoder(Protocol):
    """What planning needs of an encoder; see `fusion_model.encoders.Encoder`."""

    dim: int
    mask_token: str
    policy: str

    @property
    def fingerprint(self) -> str:
        """Equal where vectors of equal inputs are equal."""

    def inputs_from_texts(self, texts: Sequence[str]) -> list[EncoderInput]:
        """One input a text."""

    def encode(self, inputs: Sequence[EncoderInput]) -> Any:
        """Vectors, [len(inputs), dim] float32 on the CPU, a tensor or an array."""


class Encoder(TextEncoder, Protocol):
    """What training and scoring need of an encoder."""

    name: str
    pooling: str
    content_sha256: str

    def save(self, directory: Path) -> None:
        """Write what cannot be had again by name (nothing for a pretrained encoder)."""


def load_encoder(
    name: str,
    pooling: str = "cls",
    *,
    dtype: str = "float32",
    device: "str | torch.device" = "cpu",
    directory: Path | None = None,
    dim: int = 768,
    policy: str = "every",
    tokens_per_batch: int | None = None,
) -> Encoder:
    """An encoder by name.

    Args:
        name: `minilm`, a Hugging Face name or local path, `zeros`, or one of `BAGS`.
        pooling: one or more of `POOLINGS` joined by `+` (Hugging Face encoders only), or `auto`:
            `static+last@K+mean@K`, K the middle one of the encoder's layers.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: bfloat16 where it is fast.
        directory: where a bag of words was saved; it has no other home.
        dim: width of `zeros`.
        policy: one of `fusion_model.encoders.policies.POLICIES`, see there, or `auto`:
            `incremental` where the encoder's architecture is known here, else `every`.
        tokens_per_batch: most encoder tokens at once (default: by device, as many as help).

    Raises:
        EncoderError: unknown, not installed, not loadable, or not able to follow the policy.
    """
    if tokens_per_batch is not None and tokens_per_batch < 1:
        raise EncoderError(f"an encoder takes at least 1 token at once, not {tokens_per_batch}")
    if name in (*BAGS, "zeros"):
        policy = "every" if policy == AUTO else policy
    elif AUTO in (pooling, policy):
        from fusion_model.encoders.sources import resolve_auto

        pooling, policy = resolve_auto(name, pooling, policy)
    incremental = parse_policy(policy).name == "incremental"
    if incremental and name in (*BAGS, "zeros"):
        raise EncoderError(f"the encoder {name!r} cannot be incremental: use another policy")
    if name == "zeros":
        return ZeroEncoder(dim, policy)
    if name in BAGS:
        if directory is None:
            raise EncoderError(f"the {name} encoder is fitted while training: it has no weights")
        return BagEncoder.load(name, directory, policy)
    from fusion_model.encoders.incremental.encoder import IncrementalEncoder
    from fusion_model.encoders.pretrained import HFEncoder

    kind = IncrementalEncoder if incremental else HFEncoder
    options: dict[str, Any] = {"policy": policy, "tokens_per_batch": tokens_per_batch}
    return kind.load(name, pooling, dtype=dtype, device=device, **options)
