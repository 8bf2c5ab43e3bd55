"""Tokens by kernels found right, the memory that they work on, and CUDA graphs of them.

Notation: B sequences, H hidden width, HP padded, D features, V vocabulary, L layers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from fusion_model.kernels.cuda_graphs import record
from fusion_model.kernels.triton.configs import on, padded, step_units
from fusion_model.kernels.triton.decode import kernel_token
from fusion_model.kernels.triton.decode_naive import Token, plain_token, scores
from fusion_model.kernels.triton.guards import trusted
from fusion_model.kernels.triton.layout import copied, pack
from torch import Tensor

TOKENS = 32  # of one CUDA graph: an even number, so that h is at the end where it was


def _trial(args: Token) -> Iterator[tuple[Tensor, Tensor]]:
    """The kernels, and PyTorch, on copies: state, logits, and the choice among those logits."""
    got, expected = (copied(args, dict.fromkeys(args.written)) for _ in range(2))
    logits = kernel_token(got)
    yield logits, plain_token(expected)
    yield from ((got.h_next, expected.h_next), (got.c, expected.c), (got.made, expected.made))
    best = scores(logits, args)
    chosen = torch.where(args.done.bool(), best.argmax(-1), got.ids)
    # Logarithms may differ in their last bit: so may the choice between two that are as good.
    right = best.gather(1, chosen[:, None])[:, 0] >= best.amax(-1) - 1e-3
    yield right, torch.ones_like(right)


def decode_token(args: Token) -> Tensor:
    """One token for every sequence; returns the logits, [B, V] float32."""
    batch = len(args.ids)
    tall = sum(batch > rows for rows in (16, 32, 64))  # which tiles: see `step_config`
    fusion = "gate" if args.gate is not None else "multiply" if args.e is not None else "plain"
    choice = "greedy" if args.greedy else "top k" if args.top_k else "all"
    shape = (*args.h.shape[::2], *args.vocabulary.shape, args.units)
    key, dtype, device = (*shape, tall, fusion, choice), args.h.dtype, args.h.device
    with on(device):
        right = trusted("decode_token", dtype, key, device, lambda: _trial(args))
        return kernel_token(args) if right else plain_token(args)


@dataclass(frozen=True)
class DecodeWeights:
    """What a token needs; all of one dtype and device.

    Attributes:
        embedding: [V, D].
        layers: of the LSTM, each (w_ih, w_hh, b_ih, b_hh).
        projection: [D', H]; what multiplies e is not in it.
        vocabulary, bias: [V, D'], [V].
        gate: [H, H], the half of the gate that reads h; or None.
        multiplies: h is multiplied by the prefix embedding.
    """

    embedding: Tensor
    layers: Sequence[Sequence[Tensor]]
    projection: Tensor
    vocabulary: Tensor
    bias: Tensor
    gate: Tensor | None = None
    multiplies: bool = False


class Decoder:
    """Steps of `batch` sequences on memory that stays where it is.

    Attributes:
        tokens: chosen so far, row by row, [steps, B] int64.
        done: which sequences have ended, [B] uint8.
        logits: of the last step, [B, V] float32; None before the first.
    """

    @torch.no_grad()
    def __init__(
        self,
        weights: DecodeWeights,
        batch: int,
        steps: int,
        *,
        greedy: bool = True,
        top_k: int = 0,
        eos: int = -1,
        pad: int | None = None,
    ) -> None:
        """`top_k` 0 samples from all tokens; `eos` -1 never ends; `pad` follows it (eos itself)."""
        hidden, kind = weights.layers[0][1].shape[1], weights.embedding.dtype
        device, layers = weights.embedding.device, len(weights.layers)
        units = step_units(batch, hidden)
        self.hidden, self.parity = hidden, 0
        self.logits: Tensor | None = None

        def zeros(*shape: int, dtype: torch.dtype = kind) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def packed(w: Tensor) -> Tensor:
            return pack(w, units).contiguous()

        width, gated = padded(hidden, units), weights.gate is not None
        inner = [packed(F.pad(w_hh, (0, width - hidden))) for _, w_hh, _, _ in weights.layers]
        biases = [packed(b_ih + b_hh) for _, _, b_ih, b_hh in weights.layers]
        first, *outer = (packed(w_ih) for w_ih, _, _, _ in weights.layers)
        # h of even and odd steps: a step must not overwrite what it reads.
        even, odd = zeros(2, layers, batch, width)
        token = Token(
            ids=zeros(batch, dtype=torch.int64),
            tokens=zeros(steps, batch, dtype=torch.int64),
            done=zeros(batch, dtype=torch.uint8),
            made=zeros(batch, dtype=torch.int64),
            seed=zeros(1, dtype=torch.int64),
            temperature=torch.ones(1, device=device),
            h=even,
            h_next=odd,
            c=zeros(layers, batch, width, dtype=torch.float32),
            table=F.linear(weights.embedding, first, biases[0]),
            inner=inner,
            outer=outer,
            biases=biases[1:],
            projection=weights.projection,
            addend=zeros(batch, len(weights.projection)),
            vocabulary=weights.vocabulary,
            bias=weights.bias,
            e=zeros(batch, hidden) if gated or weights.multiplies else None,
            gate=weights.gate,
            gate_addend=zeros(batch, hidden) if gated else None,
            units=units,
            greedy=greedy,
            top_k=top_k,
            eos=eos,
            pad=eos if pad is None else pad,
        )
        self.steps = token, token._replace(h=odd, h_next=even)
        self.tokens, self.done = token.tokens, token.done

    @torch.no_grad()
    def start(
        self, ids: Tensor, h: Tensor, c: Tensor, *, seed: int = 0, temperature: float = 1.0
    ) -> None:
        """Go on from the last tokens [B] and the state before them, each [B, L, H]."""
        token, self.parity = self.steps[0], 0
        token.ids.copy_(ids)
        for zeroed in (token.made, token.done, token.h, token.c):
            zeroed.zero_()
        token.h[:, :, : self.hidden] = h.transpose(0, 1)
        token.c[:, :, : self.hidden] = c.transpose(0, 1)
        token.seed.fill_(seed)
        token.temperature.fill_(temperature)

    @torch.no_grad()
    def set_prefix(
        self, addend: Tensor, e: Tensor | None = None, gate_addend: Tensor | None = None
    ) -> None:
        """What e adds from now on.

        Args:
            addend: bias of the projection and what e gives through it, [B, D'] or [D'].
            e: [B, H], where fusion multiplies or gates.
            gate_addend: bias of the gate and what e gives through it, [B, H].
        """
        token = self.steps[0]
        token.addend.copy_(addend.expand_as(token.addend))
        for kept, given in ((token.e, e), (token.gate_addend, gate_addend)):
            if kept is not None and given is not None:
                kept.copy_(given)

    def step(self) -> Tensor:
        """One token for every sequence, and the logits; nothing here waits for the device."""
        self.logits = decode_token(self.steps[self.parity])
        self.parity = 1 - self.parity
        return self.logits

    def run(self, count: int) -> Tensor:
        """So many tokens for every sequence, at least one, and the logits of the last."""
        for _ in range(count - 1):
            self.step()
        return self.step()

    def state(self) -> tuple[Tensor, Tensor]:
        """(h, c) after the last step, each [B, L, H]."""
        token = self.steps[self.parity]
        h, c = (s[:, :, : self.hidden].transpose(0, 1) for s in (token.h, token.c))
        return h.clone(), c.to(h.dtype)


class TokenGraph:
    """A `Decoder` by CUDA graphs: one launch by the host for one token, or for `TOKENS` of them."""

    def __init__(self, decoder: Decoder) -> None:
        """Captures an even and an odd step, which differ in where h lies, and many; `start` after.

        Raises:
            ValueError: the decoder's memory is not on a CUDA device.
        """
        if decoder.done.device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, not {decoder.done.device}")
        self.decoder, decoder.parity = decoder, 0
        with on(decoder.done.device):
            self.one = [record(decoder.step) for _ in range(2)]
            self.many = record(partial(decoder.run, TOKENS))

    def run(self, count: int) -> Tensor:
        """As `Decoder.run`, by replaying graphs: those of many tokens from even steps on."""
        decoder = self.decoder
        while count:
            many = count >= TOKENS and decoder.parity == 0
            graph, decoder.logits = self.many if many else self.one[decoder.parity]
            graph.replay()
            if not many:
                decoder.parity = 1 - decoder.parity
            count -= TOKENS if many else 1
        assert decoder.logits is not None
        return decoder.logits
