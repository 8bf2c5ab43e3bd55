"""The model: tokens and prefix embeddings in, scores of the next token out.

Shapes: B sequences, T tokens, D embedding width, H hidden width, E prefix-embedding width,
V vocabulary. Position t predicts token t + 1 from tokens 0..t and from `prefix_embeds[:, t]`,
the embedding of tokens 0..t (arXiv 2208.02402).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, can_return_tuple

from fusion_model.attached import WithEncoder
from fusion_model.config import FusionLMConfig
from fusion_model.fusion import first_state, fuse, scaled, start
from fusion_model.generation import StatefulGenerationMixin
from fusion_model.kernels import (
    LayerWeights,
    compute_dtype,
    dropout,
    lstm_sequence,
    lstm_tokens,
    prefix_lstm,
    resolve_backend,
    target_log_probs,
)
from fusion_model.names import EARLY


@dataclass
class FusionLMOutput(ModelOutput):
    """Output of `FusionLMForCausalLM`.

    Attributes:
        loss: mean negative log-likelihood in nats, when labels were given.
        logits: scores before the softmax, [B, T, V].
        state: two tensors, batch first, to pass back for the next tokens: (h, c), each
            [B, L, H]; for early fusion with an embedding a position, where every prefix starts
            anew, the tokens so far and their mask, each [B, T].
        hidden_states: where asked for, the token embeddings [B, T, D], the states of the LSTM's
            top layer [B, T, H], and what `lm_head` reads [B, T, D].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: tuple[Tensor, Tensor] | None = None
    hidden_states: tuple[Tensor, Tensor, Tensor] | None = None


class FusionLMForCausalLM(WithEncoder, PreTrainedModel, StatefulGenerationMixin):
    """LSTM language model that fuses prefix embeddings (arXiv 2208.02402, section 3).

    The published input layer is a table plus a bias; the bias is part of the table here, since
    a sum of both is again a table. Where E differs from what a fusion needs, `prefix_projection`
    is an affine map E -> H.
    """

    config_class = FusionLMConfig
    config: FusionLMConfig
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FusionLMConfig) -> None:
        super().__init__(config)
        size, hidden, fusion = config.embedding_size, config.hidden_size, config.fusion
        self.backend = "auto"
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.lstm = nn.LSTM(
            size + (config.prefix_size if fusion == "input" else 0),
            hidden,
            config.num_layers,
            batch_first=True,
        )
        needs_hidden_width = fusion in ("add", "multiply", "gate", *EARLY)
        self.prefix_scale: Tensor | None
        self.register_buffer(
            "prefix_scale", torch.ones(config.prefix_size) if config.scale_prefix else None
        )
        self.prefix_projection: nn.Module = nn.Identity()
        if needs_hidden_width and config.prefix_size != hidden:
            self.prefix_projection = nn.Linear(config.prefix_size, hidden)
        if fusion == "gate":
            self.gate = nn.Linear(2 * hidden, hidden)
        joined = hidden + (config.prefix_size if fusion == "concat" else 0)
        self.projection = nn.Linear(joined, size)
        self.lm_head = nn.Linear(size, config.vocab_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # PyTorch's own initialisations, through transformers.initialization so that weights
        # which were just loaded stay as they are.
        if isinstance(module, nn.LSTM):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, but in float32 unless a `dtype` is named: files may be smaller."""
        if not {"dtype", "torch_dtype"} & set(kwargs):
            kwargs["dtype"] = torch.float32
        return super().from_pretrained(*args, **kwargs)

    def set_backend(self, backend: str) -> None:
        """Choose how the recurrence runs: one of `fusion_model.kernels.BACKENDS`."""
        resolve_backend(backend, self.device)
        self.backend = backend

    def features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prefix_embeds: Tensor | None = None,
        state: tuple[Tensor, Tensor] | None = None,
        use_cache: bool = True,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """What `lm_head` reads, [B, T, D], and the state. Arguments as in `forward`."""
        hidden, e, new = self._hidden(input_ids, attention_mask, prefix_embeds, state, use_cache)
        return self._project(hidden, e), new

    def _hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prefix_embeds: Tensor | None,
        state: tuple[Tensor, Tensor] | None,
        use_cache: bool,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
        """The LSTM's top layer, [B, T, H], the embeddings to fuse, and the state."""
        e = self._check_prefix_embeds(input_ids, attention_mask, prefix_embeds, state)
        per_prefix = self.config.fusion in EARLY and e is not None and e.dim() == 3
        mask, step_mask = torch.ones_like(input_ids), None
        if attention_mask is not None:  # to look at one, a GPU is waited for
            mask = attention_mask[:, -input_ids.shape[1] :]
            # What follows a token never reaches it: padding on the right only spoils the state.
            holds = not use_cache and bool((mask[:, 1:] <= mask[:, :-1]).all())
            step_mask = None if holds or bool(mask.all()) else mask
        if e is not None:
            e = e.to(compute_dtype(self.embed_tokens.weight))
            e = dropout(e, self.config.prefix_dropout, self.training)
        if per_prefix:
            assert e is not None
            hidden, new_state = self._run_prefixes(input_ids, mask, step_mask is not None, e, state)
        else:
            hidden, new_state = self._run_sequence(input_ids, step_mask, e, state)
        return hidden, e, new_state if use_cache else None

    def _embed(self, input_ids: Tensor) -> Tensor:
        return self._drop(self.embed_tokens(input_ids))

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.config.dropout, self.training)

    def _recurrent_weights(self) -> list[LayerWeights]:
        return self.lstm.all_weights  # type: ignore[return-value]

    def _run_sequence(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        e: Tensor | None,
        state: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if state is None:
            state = first_state(self, e, len(input_ids))
        elif not state[0].is_floating_point():
            raise ValueError("this state comes from prefix_embeds [B, T, E]: pass them again")
        weights = self._recurrent_weights()
        options: dict[str, Any] = {"mask": mask, "backend": self.backend}
        if not self.training and self.config.fusion != "input":
            return lstm_tokens(input_ids, self.embed_tokens.weight, state, weights, **options)
        x = self._embed(input_ids)
        if self.config.fusion == "input":
            assert e is not None
            e = e if e.dim() == 3 else e[:, None].expand(-1, x.shape[1], -1)
            x = torch.cat([x, scaled(e, self.prefix_scale)], dim=-1)
        dropout = self.config.dropout if self.training else 0.0
        return lstm_sequence(x, state, weights, dropout=dropout, **options)

    def _run_prefixes(
        self,
        input_ids: Tensor,
        mask: Tensor,
        padded: bool,
        e: Tensor,
        state: tuple[Tensor, Tensor] | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if state is not None:
            if state[0].is_floating_point():
                raise ValueError("this state comes from prefix_embeds [B, E]: pass those again")
            input_ids = torch.cat([state[0], input_ids], dim=1)
            mask = torch.cat([state[1], mask], dim=1)
            padded = not bool(mask.all())
        hidden = prefix_lstm(
            self._embed(input_ids),
            *start(self, e),
            self._recurrent_weights(),
            mask=mask if padded else None,
            dropout=self.config.dropout if self.training else 0.0,
            backend=self.backend,
        )
        return hidden, (input_ids, mask)

    def _project(self, hidden: Tensor, e: Tensor | None) -> Tensor:
        """What `lm_head` reads, [B, T, D]."""
        return self.projection(fuse(self, self._drop(hidden), e))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        prefix_embeds: Tensor | None = None,
        state: tuple[Tensor, Tensor] | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> FusionLMOutput:
        """Scores of the next token at every position.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], or [B, S + T] when `state` covers S tokens; 0 at padding,
                on either side: the state is held over it.
            prefix_embeds: [B, T, E], position t holds the embedding of tokens 0..t; or [B, E],
                one vector for the sequence. Omitted, the attached encoder computes them.
            state: from the output of an earlier call, to go on from there.
            labels: [B, T], as in transformers: shifted inside, -100 is ignored.
            use_cache: return the state (default: the configuration's).
            logits_to_keep: score only the last n positions (0: all).
            output_hidden_states: see `FusionLMOutput` (default: the configuration's).
            num_items_in_batch: labels of all batches of a step, which the loss is divided by.

        With `return_dict=False`, a tuple.

        Raises:
            ValueError: embeddings missing, of the wrong shape, or not finite.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        asked = input_ids, attention_mask, prefix_embeds, state
        hidden, e, state = self._hidden(*asked, use_cache)
        features = self._project(hidden, e)
        logits = self.lm_head(features[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            size, of = self.config.vocab_size, num_items_in_batch
            loss = self.loss_function(logits, labels, size, num_items_in_batch=of)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = (self.embed_tokens(input_ids), hidden, features) if output_hidden_states else None
        return FusionLMOutput(loss=loss, logits=logits, state=state, hidden_states=states)

    def token_log_probs(
        self,
        input_ids: Tensor,
        prefix_embeds: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """log p of tokens 1..T-1 given what precedes, in nats: the real ones only, row by row.

        Args:
            input_ids: [B, T], padded on the right.
            prefix_embeds: [B, T - 1, E] or [B, E]: the last token predicts nothing.
            lengths: number of real tokens of each row, [B] (default: T); best on the CPU, as
                a GPU would be waited for.

        Returns:
            [sum of (lengths - 1)], float32.
        """
        features, _ = self.features(input_ids[:, :-1], None, prefix_embeds, use_cache=False)
        features, targets = features.flatten(0, 1), input_ids[:, 1:].flatten()
        if lengths is not None:
            real = torch.arange(input_ids.shape[1] - 1) < (lengths.cpu() - 1)[:, None]
            places = real.flatten().nonzero()[:, 0].to(targets.device, non_blocking=True)
            features, targets = features[places], targets[places]
        return target_log_probs(
            features, self.lm_head.weight, self.lm_head.bias, targets, backend=self.backend
        )


AutoConfig.register("fusion_lm", FusionLMConfig)
AutoModelForCausalLM.register(FusionLMConfig, FusionLMForCausalLM)
