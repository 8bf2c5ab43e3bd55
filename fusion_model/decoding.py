"""Greedy search and sampling in `generate`, where nothing else was asked for.

`decode` stays on a GPU: cell, fusion, vocabulary and choice without the host, for one embedding a
sequence or none. `decode_on_host` is a loop for CPUs, where transformers' own takes as long as the
model; it encodes prefixes as they grow, which `growing_token` does on a GPU. All else is the
ordinary path of `generate`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    MaxLengthCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from fusion_model.fusion import Fusing, first_state, without_hidden
from fusion_model.kernels import resolve_backend
from fusion_model.kernels.cuda_graphs import in_use

LOOK = 32  # tokens between two looks at whether all sequences have ended, one CUDA graph


class Decodable(Fusing, Protocol):
    """A model, as far as decoding reads it."""

    embed_tokens: nn.Embedding
    lstm: nn.LSTM
    lm_head: nn.Linear
    prefix_encoder: Any
    backend: str
    training: bool

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prefix_embeds: Tensor | None,
        state: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]: ...

    def encode_prefixes(self, input_ids: Tensor, mask: Tensor, start: int) -> Tensor: ...


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


def obstacle(model: Decodable, state: Any = None, **others: Any) -> str | None:
    """Why these inputs of `generate` need the ordinary path, or None."""
    if model.training or torch.is_autocast_enabled(model.device.type):
        return "the model is in training mode, or under autocast"
    if state is not None:
        return "it starts from a prompt"
    if known := set(others) - {"prefix_embeds", "attention_mask", "use_cache", "logits_to_keep"}:
        return f"it does not know {', '.join(sorted(known))}"
    return None


def needs_host(
    model: Decodable,
    prefix_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    use_cache: bool | None = True,
    **others: Any,
) -> str | None:
    """Why a GPU alone cannot decode these, or None."""
    fusion = model.config.fusion
    if fusion == "input":
        return "fusion='input' feeds an embedding to every step"
    if fusion != "none" and (prefix_embeds is None or prefix_embeds.dim() != 2):
        return f"it takes one embedding a sequence, prefix_embeds [B, {model.config.prefix_size}]"
    if not use_cache:
        return "it keeps the state"
    if attention_mask is not None and not bool(attention_mask.all()):
        return "prompts of different lengths are padded"
    return None


_decoders: WeakKeyDictionary[Decodable, tuple[Any, Any]] = WeakKeyDictionary()


def _runner(model: Decodable, batch: int, steps: int, choice: Choice, graph: bool) -> Any:
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


@torch.no_grad()
def decode(
    model: Decodable,
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

    The host launches one graph for `LOOK` tokens, then looks whether all sequences have ended;
    where a streamer waits for tokens, one for each.
    """
    with in_use:
        new = _decoded(model, input_ids, prefix_embeds, steps, choice, seed, graph, streamer)
    if streamer is not None:
        streamer.end()
    return torch.cat([input_ids, new.to(input_ids.device)], dim=1)


def _decoded(
    model: Decodable,
    input_ids: Tensor,
    prefix_embeds: Tensor | None,
    steps: int,
    choice: Choice,
    seed: int,
    graph: bool,
    streamer: Any,
) -> Tensor:
    """What `decode` adds, [B, N]."""
    batch, prompt = len(input_ids), input_ids.to(model.device)
    e = None if prefix_embeds is None else prefix_embeds.to(model.device, model.dtype)
    runner, decoder = _runner(model, batch, steps, choice, graph)
    decoder.set_prefix(*without_hidden(model, e))
    state = first_state(model, e, batch)
    if prompt.shape[1] > 1:  # after all tokens but the last
        state = model.features(prompt[:, :-1], None, e)[1] or state
    decoder.start(prompt[:, -1], *state, seed=seed, temperature=choice.temperature or 1.0)
    made, look = 0, LOOK if streamer is None else 1
    while made < steps:
        count = min(look, steps - made)
        runner.run(count)
        made += count
        if streamer is not None:
            streamer.put(decoder.tokens[made - 1].cpu())
        if choice.eos >= 0 and made < steps and bool(decoder.done.all()):
            break
    new = decoder.tokens[:made].t()
    if choice.eos >= 0:
        ended = (new == choice.eos).cumsum(1).clamp(max=1)  # 1 from a sequence's end on
        new = new[:, : int((ended.amin(0) == 0).sum()) + 1]
    return new.clone()


@torch.no_grad()
def decode_on_host(
    model: Decodable,
    input_ids: Tensor,
    prefix_embeds: Tensor | None,
    attention_mask: Tensor | None,
    steps: int,
    choice: Choice,
    streamer: Any = None,
    use_cache: bool | None = True,
) -> Tensor:
    """As `decode`, of prompts that may be padded; without `prefix_embeds` [B, E] prefixes are
    encoded as they grow. Without a cache every token is computed anew."""
    batch, prompt = input_ids.shape
    mask = input_ids.new_ones(batch, prompt + steps)
    if attention_mask is not None:
        mask[:, :prompt] = attention_mask
    tokens = torch.cat([input_ids, torch.empty_like(mask[:, prompt:])], dim=1)
    going = torch.ones(batch, dtype=torch.bool, device=tokens.device)
    grows = model.config.fusion != "none" and prefix_embeds is None
    start, end, state = 0, prompt - 1, None
    for end in range(prompt, prompt + steps):
        if grows:
            prefix_embeds = model.encode_prefixes(tokens[:, :end], mask[:, :end], start)
        read_mask = mask[:, :end] if start == 0 else None
        features, state = model.features(tokens[:, start:end], read_mask, prefix_embeds, state)
        start, state = (end, state) if use_cache else (0, None)
        chosen = choose(model.lm_head(features[:, -1]).float(), choice)
        tokens[:, end] = chosen if choice.eos < 0 else chosen.where(going, choice.pad)
        if streamer is not None:
            streamer.put(tokens[:, end].cpu())
        if choice.eos >= 0:
            going &= chosen != choice.eos
            if not bool(going.any()):
                break
    if streamer is not None:
        streamer.end()
    return tokens[:, : end + 1]


def choose(scores: Tensor, choice: Choice) -> Tensor:
    """Tokens [B] by their scores [B, V]: the best, or one drawn from the softmax."""
    if choice.temperature == 0:
        return scores.argmax(dim=-1)
    kept = None
    if choice.top_k:
        scores, kept = scores.topk(min(choice.top_k, scores.shape[-1]))
    below = torch.softmax(scores / choice.temperature, dim=-1).cumsum(dim=-1)
    drawn = torch.rand(len(scores), 1, device=scores.device) * below[:, -1:]
    place = torch.searchsorted(below, drawn, right=True).clamp_(max=scores.shape[-1] - 1)
    return (place if kept is None else kept.gather(1, place))[:, 0]


def sample(
    model: Decodable,
    input_ids: Tensor,
    processors: Iterable[Any],
    criteria: Iterable[Any],
    config: GenerationConfig,
    streamer: Any,
    inputs: dict[str, Any],
) -> Tensor | None:
    """What `generate` returns, if it can be made here; else None.

    That is where nothing but length, sampling, temperature, top k and end of sentence was asked
    for: no beams, penalties, scores, ….

    Greedy tokens are those of the ordinary path, up to ties within rounding. Samples follow the
    same distribution with other random numbers; `torch.manual_seed` repeats them.
    """
    choice = choice_of(config, processors, criteria)
    if choice is None or obstacle(model, **inputs) is not None:
        return None
    assert config.max_length is not None
    steps = config.max_length - input_ids.shape[1]
    e, device = inputs.get("prefix_embeds"), model.device
    backend = resolve_backend(model.backend, device, operation="decode", dtype=model.dtype)
    if backend == "triton" and needs_host(model, **inputs) is None:
        seed = int(torch.randint(2**62, ())) if config.do_sample else 0
        on_gpu = device.type == "cuda"
        given = model, input_ids, e, steps, choice
        return decode(*given, seed=seed, graph=on_gpu, streamer=streamer)
    if device.type == "cpu" and (e is None or e.dim() == 2):
        mask, cache = inputs.get("attention_mask"), inputs.get("use_cache", True)
        return decode_on_host(model, input_ids, e, mask, steps, choice, streamer, cache)
    return None
