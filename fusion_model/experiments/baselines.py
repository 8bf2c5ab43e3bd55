"""Models that only experiments need; all keep the interface of `FusionLMForCausalLM`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_model.config import FusionLMConfig
from fusion_model.fusion import scaled
from fusion_model.kernels import LayerWeights, compute_dtype
from fusion_model.model import FusionLMForCausalLM

WEIGHT_DROP, EMBEDDING_DROP = 0.5, 0.1  # as Merity et al. publish them


class RegularisedLM(FusionLMForCausalLM):
    """Trained with AWD-LSTM's regularisers (Merity, Keskar & Socher 2018, arXiv 1708.02182).

    Weight-drop on the hidden-to-hidden matrices, whole words dropped from the embedding, and
    dropout masks that one sentence keeps over all positions. Saved, it is a plain
    `FusionLMForCausalLM`: in evaluation the two are the same.
    """

    def _recurrent_weights(self) -> list[LayerWeights]:
        return [
            [w_ih, F.dropout(w_hh, WEIGHT_DROP, self.training), b_ih, b_hh]
            for w_ih, w_hh, b_ih, b_hh in self.lstm.all_weights
        ]

    def _drop(self, x: Tensor) -> Tensor:
        """x [B, T, D]: one mask [B, 1, D] for all positions."""
        p = self.config.dropout
        if not self.training or p == 0:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), p)

    def _embed(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        if self.training:
            keep = F.dropout(x.new_ones(self.config.vocab_size), EMBEDDING_DROP)
            x = x * keep[input_ids, None]
        return self._drop(x)


class DroppingLM(FusionLMForCausalLM):
    """Dropout on e acts in evaluation, too, as in the paper's code: a model weaned off e is chosen
    and scored as it will be used, without."""

    def _check_prefix_embeds(self, *args: Any) -> Tensor | None:
        e = super()._check_prefix_embeds(*args)
        return e if e is None or self.training else F.dropout(e, self.config.prefix_dropout)


class EmbeddingOnlyLM(FusionLMForCausalLM):
    """No LSTM: three affine layers from e to the next word, E → H → D → V."""

    def __init__(self, config: FusionLMConfig) -> None:
        super().__init__(config)
        self.lstm = nn.Identity()  # type: ignore[assignment]
        self.embed_tokens = nn.Identity()  # type: ignore[assignment]
        self.first = nn.Linear(config.prefix_size, config.hidden_size)
        self.projection = nn.Linear(config.hidden_size, config.embedding_size)
        self.post_init()

    def _hidden(
        self, input_ids: Tensor, attention_mask: Any, prefix_embeds: Tensor | None, *_: Any
    ) -> tuple[Tensor, None, None]:
        """[B, T, H]; the tokens themselves are not looked at."""
        e = self._check_prefix_embeds(input_ids, attention_mask, prefix_embeds, None)
        assert e is not None
        e = e.to(compute_dtype(self.projection.weight))
        e = F.dropout(scaled(e, self.prefix_scale), self.config.prefix_dropout, self.training)
        return torch.relu(self.first(e)), None, None

    def _project(self, hidden: Tensor, e: Tensor | None) -> Tensor:
        return torch.relu(self.projection(self._drop(hidden)))


MODELS = {
    "plain": FusionLMForCausalLM,
    "awd": RegularisedLM,
    "mlp": EmbeddingOnlyLM,
    "dropping": DroppingLM,
}
