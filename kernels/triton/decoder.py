"""One token as an operator, the memory that it works on, and the CUDA graph of it.

Notation: B sequences, H hidden width, HP padded, D features, V vocabulary, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fusion_model.kernels.cuda_graphs import record
from fusion_model.kernels.triton.configs import on, padded, step_units
from fusion_model.kernels.triton.decode import kernel_token
from fusion_model.kernels.triton.decode_naive import Token, plain_token, scores
from fusion_model.kernels.triton.guards import close, trusted
from fusion_model.kernels.triton.layout import pack
from torch import Tensor

WRITTEN = ("ids", "tokens", "done", "made", "h_next", "c")


def _agrees(args: Token) -> bool:
    """The kernels against PyTorch, on copies: state, logits, and the choice among those logits."""
    results = []
    for run in (kernel_token, plain_token):
        fresh = {name: getattr(args, name).clone() for name in WRITTEN}
        results.append((run(args._replace(**fresh)), fresh))
    (logits, got), (expected, wanted) = results
    alike = [(logits, expected), (got["h_next"], wanted["h_next"]), (got["c"], wanted["c"])]
    best = scores(logits, args)
    chosen = torch.where(args.done.bool(), best.argmax(-1), got["ids"])
    # Logarithms may differ in their last bit: so may the choice between two that are as good.
    right = best.gather(1, chosen[:, None])[:, 0] >= best.amax(-1) - 1e-3
    return (
        all(close(a, b, args.h.dtype) for a, b in alike)
        and bool(right.all())
        and torch.equal(got["made"], wanted["made"])
    )


@torch.library.custom_op("fusion_lm::decode_token", mutates_args=WRITTEN)
def decode_token(
    ids: Tensor,
    tokens: Tensor,
    done: Tensor,
    made: Tensor,
    seed: Tensor,
    temperature: Tensor,
    h: Tensor,
    h_next: Tensor,
    c: Tensor,
    table: Tensor,
    inner: list[Tensor],
    outer: list[Tensor],
    biases: list[Tensor],
    projection: Tensor,
    addend: Tensor,
    vocabulary: Tensor,
    bias: Tensor,
    e: Tensor | None,
    gate: Tensor | None,
    gate_addend: Tensor | None,
    units: int,
    greedy: bool,
    top_k: int,
    eos: int,
    pad: int,
) -> Tensor:
    """One token for every sequence; see `decoding.Token`. Returns the logits, [B, V] float32."""
    args = Token(
        ids, tokens, done, made, seed, temperature, h, h_next, c, table, inner, outer, biases,
        projection, addend, vocabulary, bias, e, gate, gate_addend, units, greedy, top_k, eos, pad,
    )  # fmt: skip
    batch = len(ids)
    tall = sum(batch > rows for rows in (16, 32, 64))  # which tiles: see `step_config`
    fusion = "gate" if gate is not None else "multiply" if e is not None else "plain"
    choice = "greedy" if greedy else "top k" if top_k else "all"
    key = (h.dtype, *h.shape[::2], *vocabulary.shape, units, tall, fusion, choice)
    with on(h.device):
        if trusted("decode_token", key, h.device, lambda: _agrees(args)):
            return kernel_token(args)
        return plain_token(args)


@decode_token.register_fake
def _(
    ids: Tensor,
    tokens: Tensor,
    done: Tensor,
    made: Tensor,
    seed: Tensor,
    temperature: Tensor,
    h: Tensor,
    h_next: Tensor,
    c: Tensor,
    table: Tensor,
    inner: list[Tensor],
    outer: list[Tensor],
    biases: list[Tensor],
    projection: Tensor,
    addend: Tensor,
    vocabulary: Tensor,
    bias: Tensor,
    e: Tensor | None,
    gate: Tensor | None,
    gate_addend: Tensor | None,
    units: int,
    greedy: bool,
    top_k: int,
    eos: int,
    pad: int,
) -> Tensor:
    return h.new_empty(ids.shape[0], vocabulary.shape[0], dtype=torch.float32)


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

    def step(self) -> None:
        """One token for every sequence; nothing here waits for the device."""
        self.logits = decode_token(*self.steps[self.parity])
        self.parity = 1 - self.parity

    def state(self) -> tuple[Tensor, Tensor]:
        """(h, c) after the last step, each [B, L, H]."""
        token = self.steps[self.parity]
        h, c = (s[:, :, : self.hidden].transpose(0, 1) for s in (token.h, token.c))
        return h.clone(), c.to(h.dtype)


class TokenGraph:
    """A `Decoder` whose step is a CUDA graph: one launch by the host, a token for each sequence."""

    def __init__(self, decoder: Decoder) -> None:
        """Captures an even and an odd step, which differ in where h lies; `start` comes after.

        Raises:
            ValueError: the decoder's memory is not on a CUDA device.
        """
        if decoder.done.device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, not {decoder.done.device}")
        self.decoder, decoder.parity = decoder, 0

        def step() -> Tensor | None:
            decoder.step()
            return decoder.logits

        with on(decoder.done.device):
            self.graphs = [record(step), record(step)]

    def step(self) -> None:
        """As `Decoder.step`, by replaying the graph."""
        graph, self.decoder.logits = self.graphs[self.decoder.parity]
        graph.replay()
        self.decoder.parity = 1 - self.decoder.parity
