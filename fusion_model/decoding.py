"""Generation that stays on the device: cell, fusion, vocabulary and choice without the host.

For one embedding a sequence, or none: a prefix that grows needs its encoder at every token, which
is the ordinary path of `generate`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from fusion_model.config import EARLY, LATE
from fusion_model.kernels import resolve_backend
from fusion_model.model import FusionLMForCausalLM

LARGEST = 65_536  # tokens of a vocabulary that one program chooses among
LOOK = 32  # tokens between two looks at whether all sequences have ended


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen, and which ends a sequence.

    Attributes:
        temperature: 0 takes the most probable token.
        top_k: sample among so many; 0: among all.
        eos: the token that ends a sequence; -1: none does.
        pad: what a sequence goes on with after its end.
    """

    temperature: float = 0.0
    top_k: int = 0
    eos: int = -1
    pad: int = -1


def choice_of(
    config: GenerationConfig, processors: Iterable[Any], criteria: Iterable[Any]
) -> Choice | None:
    """What `generate` was asked for, if it is no more than a `Choice` and a length; else None.

    transformers makes a processor or a criterion of each option that changes tokens: where all of
    them are known here, nothing else was asked for.
    """
    if config.return_dict_in_generate:
        return None
    temperature, top_k, eos = 1.0, 0, -1
    for processor in processors:
        if not config.do_sample:
            return None
        if type(processor) is TemperatureLogitsWarper:
            temperature = float(processor.temperature)
        elif type(processor) is TopKLogitsWarper:
            top_k = int(processor.top_k)
        else:
            return None
    for criterion in criteria:
        if type(criterion) is EosTokenCriteria and criterion.eos_token_id.numel() == 1:
            eos = int(criterion.eos_token_id)
        elif type(criterion) is not MaxLengthCriteria:
            return None
    pad = eos if config.pad_token_id is None else int(config.pad_token_id)
    return Choice(temperature if config.do_sample else 0.0, top_k, eos, pad)


def obstacle(
    model: FusionLMForCausalLM,
    prefix_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> str | None:
    """Why these inputs of `generate` need the ordinary path, or None."""
    fusion, device = model.config.fusion, model.device
    if fusion == "input":
        return "fusion='input' feeds an embedding to every step"
    if fusion != "none" and (prefix_embeds is None or prefix_embeds.dim() != 2):
        return f"it takes one embedding a sequence, prefix_embeds [B, {model.config.prefix_size}]"
    if model.config.vocab_size > LARGEST:
        return f"the vocabulary has more than {LARGEST:,} tokens"
    if model.training or torch.is_autocast_enabled(device.type):
        return "the model is in training mode, or under autocast"
    if others.get("state") is not None or not others.get("use_cache", True):
        return "it starts from a prompt, and keeps the state"
    if known := set(others) - {"state", "use_cache", "logits_to_keep"}:
        return f"it does not know {', '.join(sorted(known))}"
    if attention_mask is not None and not bool(attention_mask.all()):
        return "prompts of different lengths are padded"
    return None


_decoders: WeakKeyDictionary[FusionLMForCausalLM, tuple[Any, Any]] = WeakKeyDictionary()


def _runner(model: FusionLMForCausalLM, batch: int, steps: int, choice: Choice, graph: bool) -> Any:
    """A decoder for so many sequences, or its graph: the last one again, if it fits."""
    from fusion_model.kernels.triton.decoder import Decoder, DecodeWeights, TokenGraph
    from fusion_model.kernels.triton.lstm import versions

    room = max(64, 1 << (steps - 1).bit_length())
    options: dict[str, Any] = {"greedy": choice.temperature == 0, "top_k": choice.top_k}
    options |= {"eos": choice.eos, "pad": choice.pad}
    key = (batch, room, graph, *options.values(), *versions(model.parameters()))
    kept = _decoders.get(model)
    if kept is None or kept[0] != key:
        hidden, fusion = model.config.hidden_size, model.config.fusion
        with torch.inference_mode(False), torch.no_grad():  # what is kept must stay writable
            weights = DecodeWeights(
                model.embed_tokens.weight,
                model.lstm.all_weights,
                model.projection.weight[:, :hidden].contiguous(),
                model.lm_head.weight,
                model.lm_head.bias,
                model.gate.weight[:, :hidden].contiguous() if fusion == "gate" else None,
                fusion == "multiply",
            )
            decoder = Decoder(weights, batch, room, **options)
            kept = _decoders[model] = key, (TokenGraph(decoder) if graph else decoder, decoder)
    return kept[1]


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


def _state(
    model: FusionLMForCausalLM, prompt: Tensor, e: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """(h, c) after all tokens of the prompts but the last, each [B, L, H]."""
    if prompt.shape[1] > 1:
        return model.features(prompt[:, :-1], None, e)[1]
    shape = (len(prompt), model.config.num_layers, model.config.hidden_size)
    if model.config.fusion in EARLY and e is not None:
        return model._initial_state(e[:, None].expand(-1, shape[1], -1))
    return (torch.zeros(shape, dtype=model.dtype, device=model.device),) * 2


@torch.no_grad()
def decode(
    model: FusionLMForCausalLM,
    input_ids: Tensor,
    prefix_embeds: Tensor | None,
    steps: int,
    choice: Choice,
    *,
    seed: int = 0,
    graph: bool = True,
    streamer: Any = None,
) -> Tensor:
    """Prompts [B, T] and at most `steps` tokens more; it ends where all sequences have ended.

    The host launches one graph a token; it looks at the tokens every `LOOK`, or, where a streamer
    waits for them, at each.
    """
    batch, prompt = len(input_ids), input_ids.to(model.device)
    e = None if prefix_embeds is None else prefix_embeds.to(model.device, model.dtype)
    runner, decoder = _runner(model, batch, steps, choice, graph)
    _set_prefix(decoder, model, e)
    state = _state(model, prompt, e)
    assert state is not None
    decoder.start(prompt[:, -1], *state, seed=seed, temperature=choice.temperature or 1.0)
    made = 0
    while made < steps:
        runner.step()
        made += 1
        if streamer is not None:
            streamer.put(decoder.tokens[made - 1].cpu())
        look = streamer is not None or made % LOOK == 0
        if choice.eos >= 0 and look and bool(decoder.done.all()):
            break
    new = decoder.tokens[:made].t()
    if choice.eos >= 0:
        ended = (new == choice.eos).cumsum(1).clamp(max=1)  # 1 from a sequence's end on
        new = new[:, : int((ended.amin(0) == 0).sum()) + 1]
    if streamer is not None:
        streamer.end()
    return torch.cat([input_ids, new.to(input_ids.device)], dim=1)


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
    """Continue each prompt by at most `max_new_tokens` tokens, until all have ended.

    A sequence that has ended goes on with its end-of-sentence token.

    Args:
        model: in evaluation mode, on a CUDA device.
        input_ids: prompts of one length, [B, T], T at least 1.
        prefix_embeds: one embedding a sequence, [B, E]; None for `fusion="none"`.
        temperature: 0 takes the most probable token.
        top_k: sample among so many; 0: among all.
        graph: replay each token as one CUDA graph; else launch its kernels one by one.

    Raises:
        ValueError: what only `model.generate` can do, or no device for the kernels; it says why.
    """
    resolve_backend("triton", model.device, dtype=model.dtype)
    if reason := obstacle(model, prefix_embeds):
        raise ValueError(f"generate_on_device cannot run this: {reason}; use model.generate")
    eos = -1 if model.config.eos_token_id is None else int(model.config.eos_token_id)
    choice = Choice(temperature, top_k, eos, eos)
    inputs = model, input_ids, prefix_embeds, max_new_tokens, choice
    return decode(*inputs, seed=seed, graph=graph)


def sample(
    model: FusionLMForCausalLM,
    input_ids: Tensor,
    processors: Iterable[Any],
    criteria: Iterable[Any],
    config: GenerationConfig,
    streamer: Any,
    inputs: dict[str, Any],
) -> Tensor | None:
    """What `generate` returns, if it can be made on the device; else None.

    That is where nothing but length, sampling, temperature, top k and end of sentence was asked
    for (no beams, penalties, scores, …), of prompts without padding, and with one prefix embedding
    a sequence or none.

    Greedy tokens are those of the ordinary path, up to ties within rounding. Samples follow the
    same distribution with other random numbers; `torch.manual_seed` repeats them.
    """
    choice = choice_of(config, processors, criteria)
    if choice is None or obstacle(model, **inputs) is not None:
        return None
    assert config.max_length is not None
    steps = config.max_length - input_ids.shape[1]
    seed = int(torch.randint(2**62, ())) if config.do_sample else 0
    given = model, input_ids, inputs.get("prefix_embeds"), steps, choice
    on_gpu = model.device.type == "cuda"
    return decode(*given, seed=seed, graph=on_gpu, streamer=streamer)
