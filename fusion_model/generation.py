"""What transformers' `generate` needs of a model whose memory is a state, not a cache of keys."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin

from fusion_model import decoding, growing_token
from fusion_model.attached import PrefixEncoder
from fusion_model.config import FusionLMConfig
from fusion_model.names import LATE

PASSED_ON = ("logits_to_keep", "output_hidden_states")


class StatefulGenerationMixin(GenerationMixin):
    """`generate` with a state of two batch-first tensors, and prefixes encoded as they grow."""

    config: FusionLMConfig
    prefix_encoder: PrefixEncoder | None
    _is_stateful = True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is our own; a DynamicCache beside it breaks beam search

    def _reorder_cache(
        self, state: tuple[Tensor, Tensor], beam_idx: Tensor
    ) -> tuple[Tensor, Tensor]:
        first, second = (s.index_select(0, beam_idx.to(s.device)) for s in state)
        return first, second

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prefix_embeds: Tensor | None = None,
        state: tuple[Tensor, Tensor] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The next call's inputs: new tokens only where there is a state, prefixes encoded."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        start = input_ids.shape[1] - 1 if state is not None else 0
        if self.config.fusion != "none" and prefix_embeds is not None and prefix_embeds.dim() == 3:
            raise ValueError(
                "generate makes prefixes that prefix_embeds [B, T, E] does not hold: pass [B, E], "
                "one vector a sequence, or none, and the attached encoder computes them"
            )
        if self.config.fusion != "none" and prefix_embeds is None:
            prefix_embeds = self.encode_prefixes(input_ids, mask, start)
        return {
            "input_ids": input_ids[:, start:],
            "attention_mask": mask,
            "prefix_embeds": prefix_embeds,
            "state": state,
            "use_cache": use_cache,
            **{name: kwargs[name] for name in PASSED_ON if name in kwargs},
        }

    def encode_prefixes(self, input_ids: Tensor, mask: Tensor, start: int) -> Tensor:
        """Embeddings [B, T - start, E] that the next call needs; for those that it does not: 0.

        Raises:
            ValueError: no encoder is attached.
        """
        encoder = self.prefix_encoder
        if encoder is None:
            raise ValueError(
                f"generate with fusion={self.config.fusion!r} needs an encoder for the "
                "prefixes that it makes: load the model with fusion_model.load, or pass "
                f"prefix_embeds [B, {self.config.prefix_size}], one vector a sequence"
            )
        # Late fusion at earlier positions reaches their own scores only, which none asks for.
        first = input_ids.shape[1] - 1 if self.config.fusion in LATE else start
        return F.pad(encoder(input_ids, mask, first), (0, 0, first - start, 0))

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search and sampling in `generate`: by ours where it can."""
        asked = input_ids, logits_processor, stopping_criteria, generation_config
        model: Any = self
        if not synced_gpus:
            for ours in (decoding, growing_token):
                found = ours.sample(model, *asked, streamer, model_kwargs)
                if found is not None:
                    return found
        ordinary: Any = super()
        return ordinary._sample(*asked, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
