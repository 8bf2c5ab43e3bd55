"""Generation that stays on the device: cell, fusion, vocabulary and choice without the host.

For one embedding a sequence, or none: a prefix that grows needs its encoder at every token, and
that is `FusionLMForCausalLM.generate`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_model.config import EARLY, LATE
from fusion_model.kernels import resolve_backend
from fusion_model.model import FusionLMForCausalLM


def _decoder(model: FusionLMForCausalLM, batch: int, steps: int, **options: Any) -> Any:
    from fusion_model.kernels.triton_decode import Decoder, DecodeWeights

    hidden, fusion = model.config.hidden_size, model.config.fusion
    gate = model.gate.weight[:, :hidden].contiguous() if fusion == "gate" else None
    weights = DecodeWeights(
        model.embed_tokens.weight,
        model.lstm.all_weights,
        model.projection.weight[:, :hidden].contiguous(),
        model.lm_head.weight,
        model.lm_head.bias,
        gate,
    )
    eos = -1 if model.config.eos_token_id is None else model.config.eos_token_id
    return Decoder(weights, batch, steps, eos=eos, **options)


def _set_prefix(decoder: Any, model: FusionLMForCausalLM, e: Tensor | None) -> None:
    fusion, hidden, projection = model.config.fusion, model.config.hidden_size, model.projection
    if fusion not in LATE or e is None:
        decoder.set_prefix(projection.bias)
        return
    e = model.prefix_projection(e)
    if fusion == "concat":
        decoder.set_prefix(F.linear(e, projection.weight[:, hidden:], projection.bias))
    elif fusion == "add":
        decoder.set_prefix(F.linear(e, projection.weight, projection.bias))
    elif fusion == "multiply":
        decoder.set_prefix(projection.bias, e)
    else:
        addend = F.linear(e, model.gate.weight[:, hidden:], model.gate.bias)
        decoder.set_prefix(projection.bias, e, addend)


@torch.no_grad()
def generate_on_device(
    model: FusionLMForCausalLM,
    input_ids: Tensor,
    prefix_embeds: Tensor | None = None,
    *,
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    graph: bool = True,
) -> Tensor:
    """Continue each prompt by `max_new_tokens` tokens, [B, T + max_new_tokens].

    A sequence that has ended goes on with its end-of-sentence token.

    Args:
        model: in evaluation mode, on a CUDA device.
        input_ids: prompts of one length, [B, T], T at least 1.
        prefix_embeds: one embedding a sequence, [B, E]; None for `fusion="none"`.
        temperature: 0 takes the most probable token.
        top_k: sample among so many; 0: among all.
        graph: replay each token as one CUDA graph; else launch its kernels one by one.

    Raises:
        ValueError: an embedding a position, `fusion="input"`, or no device for the kernels.
    """
    fusion = model.config.fusion
    resolve_backend("triton", model.device, dtype=model.dtype)
    if fusion == "input":
        raise ValueError("generate_on_device cannot run fusion='input': use model.generate")
    if fusion != "none" and (prefix_embeds is None or prefix_embeds.dim() != 2):
        raise ValueError(
            f"generate_on_device needs one embedding a sequence, prefix_embeds [B, "
            f"{model.config.prefix_size}]; for one a position use model.generate"
        )
    batch, length = input_ids.shape
    e = None if prefix_embeds is None else prefix_embeds.to(model.dtype)
    options = {"temperature": temperature, "top_k": top_k, "seed": seed}
    decoder = _decoder(model, batch, max_new_tokens, **options)
    _set_prefix(decoder, model, e)
    shape = (batch, model.config.num_layers, model.config.hidden_size)
    state = (torch.zeros(shape, dtype=model.dtype, device=model.device),) * 2
    if length > 1:
        _, found = model.features(input_ids[:, :-1], None, e)
        assert found is not None
        state = found
    elif fusion in EARLY and e is not None:
        state = model._initial_state(e[:, None].expand(-1, shape[1], -1))
    decoder.start(input_ids[:, -1], *state)
    runner: Any = decoder
    if graph:
        from fusion_model.kernels.triton_decode import TokenGraph

        runner = TokenGraph(decoder)
    for _ in range(max_new_tokens):
        runner.step()
    return torch.cat([input_ids, decoder.tokens.t()], dim=1)
