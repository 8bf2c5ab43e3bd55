"""The encoder that a model was trained with, by its configuration, as the model asks it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fusion_model.config import FusionLMConfig
from fusion_model.encoders import load_encoder
from fusion_model.errors import EncoderError, first_line
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.prefixes.stream import PrefixStream
from fusion_model.prefixes.views import CAUSAL_VIEWS

PrefixEncoder = Callable[[Tensor, Tensor, int], Tensor]
"""(input_ids [B, T], attention_mask [B, T], start) -> embeddings of the prefixes that end at
positions start..T-1, [B, T - start, E]."""


class PrefixCache(PrefixStream):
    """`PrefixStream` as the model calls them: with tensors."""

    @property
    def planner(self) -> PrefixPlanner:
        """What plans and encodes."""
        return self._planner

    def pieces(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Under policy `incremental`: the encoder's ids of each row's text, no special tokens."""
        inputs = self.inputs(rows, -1)
        return [np.frombuffer(given.ids, dtype="<i4").tolist() for (given,) in inputs]

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, start: int) -> Tensor:
        """See `PrefixEncoder`."""
        found = self.of_rows(input_ids.tolist(), start)
        vectors = torch.stack([torch.as_tensor(vector) for vector in found])
        return vectors.view(len(input_ids), -1, vectors.shape[-1]).to(input_ids.device)


def load_planner(
    config: FusionLMConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    encoder: str | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    policy: str | None = None,
    tokens_per_batch: int | None = None,
) -> PrefixPlanner:
    """What plans and encodes the prefixes of a fused model.

    Args:
        name: folder or hub name of the model; what was fitted with it lies there.
        encoder: where the encoder lies now, if it moved since training.
        dtype, tokens_per_batch: of the encoder, as in `load_encoder`.
        policy: in place of the model's own.

    Raises:
        EncoderError: the encoder is missing, or is not the one of the training; an unfused model.
    """
    if config.encoder is None:
        raise EncoderError(f"{name} was trained without an encoder: it has no prefix embeddings")
    found = load_encoder(
        encoder or config.encoder,
        config.pooling,
        dtype=dtype,
        device=device,
        directory=Path(name),
        dim=config.prefix_size,
        policy=policy or config.policy,
        tokens_per_batch=tokens_per_batch,
    )
    if found.content_sha256 != config.encoder_sha256:
        raise EncoderError(
            f"{name} was trained with another encoder than {found.name} holds now (sha256 "
            f"{str(config.encoder_sha256)[:12]}…, found {found.content_sha256[:12]}…): name the "
            "right one with --encoder"
        )
    return PrefixPlanner(found, tokenizer, config.view, config.shares_vocabulary)


class WithEncoder:
    """The part of a model that takes prefix embeddings, or has its own encoder make them."""

    config: FusionLMConfig
    name_or_path: Any
    device: torch.device
    _prefix_encoder: PrefixEncoder | None = None

    @property
    def prefix_encoder(self) -> PrefixEncoder | None:
        """What encodes prefixes that nobody passes.

        `fusion_model.load` attaches it; to a model that was loaded by its class or an Auto class
        it is attached, in float32, when it is first needed. None where there is none that
        generates: a model that was never saved, or was trained with vectors of a caller, or whose
        view sees the future.

        Raises:
            EncoderError: as `load_planner`; the model's tokenizer is missing.
        """
        config, name, found = self.config, self.name_or_path, self._prefix_encoder
        if found is None and name and config.encoder and config.view in CAUSAL_VIEWS:
            try:
                tokenizer = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError) as error:
                raise EncoderError(f"{name} lacks its tokenizer ({first_line(error)})") from error
            planner = load_planner(config, tokenizer, name, device=self.device)
            found = self._prefix_encoder = PrefixCache(planner)
        return found

    @prefix_encoder.setter
    def prefix_encoder(self, encoder: PrefixEncoder | None) -> None:
        self._prefix_encoder = encoder

    def _check_prefix_embeds(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        e: Tensor | None,
        state: tuple[Tensor, Tensor] | None,
    ) -> Tensor | None:
        fusion, size = self.config.fusion, self.config.prefix_size
        if fusion == "none":
            return None
        if e is None:
            encoder = None if state is not None else self.prefix_encoder
            if encoder is None:
                raise ValueError(
                    f"fusion={fusion!r} needs prefix_embeds, [B, T, {size}] or [B, {size}]: pass "
                    "them, or load the model with fusion_model.load, which attaches its encoder"
                )
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            e = encoder(input_ids, mask, 0)
        batch, length = input_ids.shape
        if tuple(e.shape) not in ((batch, length, size), (batch, size)):
            raise ValueError(
                f"prefix_embeds has shape {list(e.shape)}: expected {[batch, length, size]}, one "
                f"a position, or {[batch, size]}, one a sequence"
            )
        # One pass over finite ones; not on a GPU, where it would wait for the result.
        suspicious = e.device.type == "cpu" and not bool(torch.isfinite(e.sum()))
        if suspicious and not bool(torch.isfinite(e).all()):
            where = (~torch.isfinite(e)).nonzero()[0].tolist()
            raise ValueError(f"prefix_embeds holds NaN or infinity, first at {where}")
        return e
