"""Greedy search and sampling on a GPU where prefixes are encoded as they grow: a token is a graph.

Encoder step, LSTM, late fusion, vocabulary and choice are plain PyTorch in static shapes, which a
CUDA graph replays: one launch a token. Where tokens are pieces of the encoder's vocabulary, nothing
returns to the host until the end; else the host looks up the pieces of the word that is being
written. Many new pieces at once, as those of a prompt, take the same operations without a graph.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, proxy

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from fusion_model.attached import PrefixCache
from fusion_model.decoding import LOOK, Choice, Decodable, choice_of, choose, obstacle
from fusion_model.encoders.incremental.cache import common
from fusion_model.encoders.incremental.encoder import IncrementalEncoder
from fusion_model.encoders.incremental.static import POOLINGS, StaticTexts
from fusion_model.fusion import fuse
from fusion_model.kernels.cuda_graphs import in_use, record
from fusion_model.kernels.triton.configs import on
from fusion_model.kernels.triton.guards import trusted
from fusion_model.names import LATE

PIECES = 4  # of a word, new at once
TRIED = 6  # tokens that the first use is held to the ordinary path by
DEVICES = ("cuda",)
MOST = 4 * 2**30  # bytes of keys and values


class GrowingToken:
    """One token for each of B sequences, on memory that stays where it is.

    Args:
        model: one that `serves`.

    Attributes:
        texts: what the encoder holds.
        graph: whether CUDA graphs are replayed.
        ids: tokens chosen last, [B].
        done: which sequences have ended, [B] bool.
        new: place of each text's first new node, how many there are, and their tokens, [B, 2 + P];
            see `StaticTexts.encode`.
        alone: tokens are pieces, and the next are set without the host.
    """

    def __init__(self, model: Decodable, batch: int, choice: Choice) -> None:
        planner = model.prefix_encoder.planner
        device, layers = model.device, model.config.num_layers
        self.model, self.choice, self.graph = proxy(model), choice, device.type == "cuda"
        self.texts = StaticTexts(planner.encoder, batch)
        self.alone = planner.to_encoder is not None
        if self.alone:
            self._piece_of = torch.from_numpy(planner.to_encoder).long().to(device)
            self._piece_of[planner.special_ids] = -1
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.new = self.ids.new_zeros(batch, 2 + (1 if self.alone else PIECES))
        self.done = self.ids.bool()
        state = 2, layers, batch, model.config.hidden_size
        self._state = torch.zeros(state, dtype=model.dtype, device=device)
        self._held: list[list[int]] = []
        self._graphs: dict[int, tuple[Any, tuple[Tensor, Tensor]]] = {}

    def start(self, scores: Tensor, state: tuple[Tensor, Tensor]) -> None:
        """Choose by scores [B, V] after a prompt; `state` (h, c), each [B, L, H], is after it."""
        self._state.copy_(torch.stack(state).transpose(1, 2))
        self.done.zero_()
        self._held = [[]] * len(self.ids)
        self._choose(scores)

    def step(self, texts: list[list[int]] | None, longest: int) -> tuple[Tensor, Tensor]:
        """One more token.

        Args:
            texts: the encoder's ids of each text, with the tokens chosen last; None where `alone`
                has set them.
            longest: nodes of the longest text, the head's included.

        Returns:
            The texts' vectors [B, E] and scores [B, V], until the next step.
        """
        new, length = self.new, self.texts.length(longest)
        if texts is not None:
            new = self._of(texts)
            new = self.new.copy_(new) if new.shape == self.new.shape else new
        if not self.graph or new is not self.new:
            return self._token(new, length)
        with on(self.ids.device):
            if length not in self._graphs:
                self._graphs[length] = self._recorded(length)
            graph, found = self._graphs[length]
            graph.replay()
        return found

    def _recorded(self, length: int) -> Any:
        """A graph, and what it returns; capturing runs it twice, which leaves no trace."""
        written = self.ids, self.done, self.new, self._state
        kept = [tensor.clone() for tensor in written]
        # What a capture allocates must stay writable, for the generator of random numbers, too.
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng([self.ids.device]):
            graph = record(lambda: self._token(self.new, length))
        for tensor, before in zip(written, kept, strict=True):
            tensor.copy_(before)
        return graph

    def _of(self, texts: list[list[int]]) -> Tensor:
        """What `new` holds, or more; a text's last node is always one."""
        known = [common(held, text[:-1]) for held, text in zip(self._held, texts, strict=True)]
        tokens = [text[n:] for n, text in zip(known, texts, strict=True)]
        width = max(self.new.shape[1] - 2, *map(len, tokens))
        rows = [
            [self.texts.head + n, len(row), *row, *[0] * (width - len(row))]
            for n, row in zip(known, tokens, strict=True)
        ]
        self._held = texts
        return torch.tensor(rows, device=self.ids.device)

    def _token(self, new: Tensor, length: int) -> tuple[Tensor, Tensor]:
        model = self.model
        e = self.texts.encode(new[:, 0], new[:, 1], new[:, 2:], length)
        x = model.embed_tokens(self.ids)
        for h, c, weights in zip(*self._state, model.lstm.all_weights, strict=True):
            x, cell = torch.lstm_cell(x, (h, c), *weights)
            h.copy_(x)
            c.copy_(cell)
        features = model.projection(fuse(model, x[:, None], e[:, None].to(x.dtype)))
        scores = model.lm_head(features[:, 0]).float()
        self._choose(scores)
        if self.alone:
            self._go_on(new)
        return e, scores

    def _choose(self, scores: Tensor) -> None:
        chosen, choice = choose(scores, self.choice), self.choice
        if choice.eos >= 0:
            chosen = chosen.where(~self.done, choice.pad)
            self.done |= chosen == choice.eos
        self.ids.copy_(chosen)

    def _go_on(self, new: Tensor) -> None:
        """The chosen tokens are the next nodes; a text that does not grow keeps its last one."""
        piece = self._piece_of[self.ids]
        grows = piece >= 0
        last = new.gather(1, (new[:, 1:2] + 1).clamp(min=2))[:, 0]
        end = new[:, 0] + new[:, 1] + grows
        begin = (end - 1).clamp(min=self.texts.head)
        self.new.copy_(torch.stack([begin, end - begin, piece.where(grows, last)], dim=1))


@torch.no_grad()
def tokens_of(
    token: GrowingToken,
    input_ids: Tensor,
    mask: Tensor,
    steps: int,
    streamer: Any = None,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Prompts [B, T] and at most `steps` tokens more, and what the last step returned. Whether all
    have ended is looked at every `LOOK` tokens, or as the host waits.

    Args:
        mask: 0 where prompts are padded, [B, T].
    """
    model, (batch, prompt) = token.model, input_ids.shape
    e = model.encode_prefixes(input_ids, mask, 0)
    features, state = model.features(input_ids, mask, e)
    token.start(model.lm_head(features[:, -1]).float(), state)
    tokens = torch.cat([input_ids, input_ids.new_zeros(batch, steps)], dim=1)
    rows, head = input_ids.tolist(), token.texts.head
    found: Sequence[Tensor] = ()
    alone, longest = False, 0
    for end in range(prompt, prompt + steps):
        if end > prompt:
            texts = None
            longest += 1
            if not alone:
                for row, chosen in zip(rows, token.ids.tolist(), strict=True):
                    row.append(chosen)
                texts = model.prefix_encoder.pieces(rows)
                longest = head + max(map(len, texts))
                alone = token.alone and longest + steps <= token.texts.window
            found = token.step(texts, longest)
        tokens[:, end] = token.ids
        if streamer is not None:
            streamer.put(token.ids.cpu())
        looks = not alone or streamer is not None or (end - prompt) % LOOK == 0
        if token.choice.eos >= 0 and looks and bool(token.done.all()):
            break
    return tokens[:, : end + 1], found


def serves(model: Decodable, input_ids: Tensor, inputs: dict[str, Any]) -> bool:
    """Whether prefixes of these inputs of `generate` can be encoded without the host: late fusion
    of the encoder's own vectors, policy `incremental`, poolings of `POOLINGS`."""
    if model.config.fusion not in LATE or inputs.get("prefix_embeds") is not None:
        return False
    stream = model.prefix_encoder
    encoder = stream.planner.encoder if isinstance(stream, PrefixCache) else None
    if not isinstance(encoder, IncrementalEncoder) or stream.planner.policy.k or not encoder.read:
        return False
    network, places = encoder.model, len(input_ids) * encoder.window
    size = 2 * encoder.deepest * places * network.config.hidden_size * network.dtype.itemsize
    known = {p.name for p in encoder.poolings} <= set(POOLINGS) and size <= MOST
    plain = model.backend != "reference" and inputs.get("use_cache", True)
    return known and plain and network.device == model.device == input_ids.device


_tokens: WeakKeyDictionary[Decodable, tuple[Any, GrowingToken]] = WeakKeyDictionary()


def _made(model: Decodable, batch: int, choice: Choice) -> GrowingToken:
    """For so many sequences; the last one again, if it fits."""
    encoder = model.prefix_encoder.planner.encoder
    key = batch, choice, id(encoder), *(weight.data_ptr() for weight in model.parameters())
    kept = _tokens.get(model)
    if kept is None or kept[0] != key:
        with torch.inference_mode(False), torch.no_grad():  # what is kept must stay writable
            kept = _tokens[model] = key, GrowingToken(model, batch, choice)
    return kept[1]


def _trial(model: Decodable, input_ids: Tensor, mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some tokens more, and the last one by the equations: the texts' vectors, and scores."""
    token, backend = _made(model, len(input_ids), Choice()), model.backend
    try:
        model.backend = "reference"  # without cuDNN's TensorFloat-32, in what is read first, too
        tokens, found = tokens_of(token, input_ids, mask, TRIED)
        mask = F.pad(mask, (0, TRIED - 1), value=1)
        e = model.encode_prefixes(tokens[:, :-1], mask, 0)
        features, _ = model.features(tokens[:, :-1], mask, e)
    finally:
        model.backend = backend
    yield from zip(found, (e[:, -1], model.lm_head(features[:, -1])), strict=True)


@torch.no_grad()
def sample(
    model: Decodable,
    input_ids: Tensor,
    processors: Iterable[Any],
    criteria: Iterable[Any],
    config: GenerationConfig,
    streamer: Any,
    inputs: dict[str, Any],
) -> Tensor | None:
    """As `fusion_model.decoding.sample`, on a GPU, of prefixes that are encoded as they grow."""
    choice = choice_of(config, processors, criteria)
    if choice is None or obstacle(model, **inputs) is not None:
        return None
    if model.device.type not in DEVICES or not serves(model, input_ids, inputs):
        return None
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    encoder, trial = model.prefix_encoder.planner.encoder, partial(_trial, model, input_ids, mask)
    dtype = min(model.dtype, encoder.model.dtype, key=lambda kind: kind.itemsize)
    what = encoder.fingerprint, model.config.fusion
    assert config.max_length is not None
    prompt = input_ids.shape[1]
    with in_use:
        if not trusted("growing_token", dtype, what, model.device, trial):
            return None
        token = _made(model, len(input_ids), choice)
        tokens, _ = tokens_of(token, input_ids, mask, config.max_length - prompt, streamer)
    if streamer is not None:
        streamer.end()
    if choice.eos < 0:
        return tokens
    ended = (tokens[:, prompt:] == choice.eos).cumsum(1).amin(0)
    return tokens[:, : prompt + int((ended == 0).sum()) + 1]
