"""One token after another on the device: cell, late fusion, projection, vocabulary, choice.

Every step is the same few launches on the same memory, so that a CUDA graph can hold it; the token
chosen is the next step's input without the host in between. Late fusion is part of the launches
that are there anyway: what of it does not depend on h (the half of `concat` and `add` that
multiplies e) comes in as an addend, `multiply` acts where the projection reads h, and `gate`,
which needs all of h, is a launch of its own.

Notation: B sequences, H hidden width, HP padded, D features, V vocabulary, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fusion_model.kernels.packed_rows import pack
from fusion_model.kernels.triton_launch import TileConfig, padded, precision, step_units
from fusion_model.kernels.triton_math import sigmoid
from fusion_model.kernels.triton_rows import OWN, TABLE, forward_constants, rows_forward
from torch import Tensor

PLAIN, MULTIPLY, GATE = 0, 1, 2


@triton.jit(do_not_specialize=["n", "outputs"])
def decode_linear(
    p_h,  # [B, STRIDE]
    p_e,  # [B, K]: multiplies h, or is mixed with it; unused where FUSION is PLAIN
    p_w,  # [O, K]
    p_addend,  # [B, O] where ROWS, else [O]
    p_out,  # [B, O]
    n,
    outputs,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    FUSION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """z = h W^T + addend, or with h * e in place of h, or s h + (1 - s) e where s = sigmoid(z)."""
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_n, m_o = o_n < n, o_o < outputs
    row, column = tl.where(m_n, o_n, 0).to(tl.int64), tl.where(m_o, o_o, 0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    z = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = o_k < K - k
        b_h = tl.load(p_h + row[:, None] * STRIDE + o_k[None, :] + k, mask=m_k[None, :], other=0.0)
        if FUSION == 1:
            o_e = row[:, None] * K + o_k[None, :] + k
            b_h *= tl.load(p_e + o_e, mask=m_k[None, :], other=0.0)
        b_w = tl.load(p_w + column[None, :] * K + o_k[:, None] + k, mask=m_k[:, None], other=0.0)
        z = tl.dot(b_h, b_w, z, input_precision=PRECISION)
    if ROWS:
        z += tl.load(p_addend + row[:, None] * outputs + column[None, :]).to(tl.float32)
    else:
        z += tl.load(p_addend + column).to(tl.float32)[None, :]
    if FUSION == 2:
        share = sigmoid(z)
        h = tl.load(p_h + row[:, None] * STRIDE + column[None, :]).to(tl.float32)
        e = tl.load(p_e + row[:, None] * K + column[None, :]).to(tl.float32)
        z = share * h + (1.0 - share) * e
    o_out = row[:, None] * outputs + column[None, :]
    tl.store(p_out + o_out, z.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_o[None, :])


@triton.jit(do_not_specialize=["v", "batch", "steps", "k", "eos"])
def decode_choose(
    p_logits,  # [B, V] float32
    p_ids,  # [B] int64: written, the next step's input
    p_tokens,  # [steps, B] int64: written, row p_count
    p_done,  # [B] uint8: sequences that have ended; their tokens stay `eos`
    p_count,  # [1] int64: steps so far
    p_seed,  # [1] int64
    p_temperature,  # [1] float32
    v,
    batch,
    steps,
    k,
    eos,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Greatest logit; or a sample, by Gumbel noise, among all tokens or the k greatest.

    One program holds a sequence's logits: vocabularies much beyond 65 000 would spill.
    """
    i_b = tl.program_id(0)
    o_v = tl.arange(0, BLOCK_V)
    m_v = o_v < v
    z = tl.load(p_logits + i_b.to(tl.int64) * v + o_v, mask=m_v, other=-float("inf"))
    count = tl.load(p_count)
    if TOP_K:
        # The k-th greatest, bit by bit, over unsigned integers in the order of the floats.
        bits = z.to(tl.int32, bitcast=True)
        order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) - (-2147483648)
        bound = count * 0
        one = bound + 1  # a tensor: 1 << 31 itself would be taken for an int32
        for bit in tl.static_range(32):
            higher = bound + (one << (31 - bit))
            enough = tl.sum((order >= higher).to(tl.int32), axis=0) >= k
            bound = tl.where(enough, higher, bound)
        m_v = m_v & (order >= bound)
    if not GREEDY:
        o_word = o_v.to(tl.uint32)
        nothing = o_word * 0
        word, _, _, _ = tl.philox(
            tl.load(p_seed), o_word, nothing + i_b.to(tl.uint32), nothing + count.to(tl.uint32),
            nothing,
        )  # fmt: skip
        uniform = tl.minimum(tl.maximum(tl.uint_to_uniform_float(word), 1e-10), 0.99999994)
        z = z / tl.load(p_temperature) - tl.log(-tl.log(uniform))
    z = tl.where(m_v, z, -float("inf"))
    token = tl.argmax(z, axis=0, tie_break_left=True).to(tl.int64)
    done = tl.load(p_done + i_b) != 0
    token = tl.where(done, eos, token)
    tl.store(p_done + i_b, (done | (token == eos)).to(tl.uint8))
    tl.store(p_ids + i_b, token)
    tl.store(p_tokens + count * batch + i_b, token, mask=count < steps)


def linear_config(rows: int, outputs: int, dtype: torch.dtype) -> TileConfig:
    """Few rows: many programs share out the weights, each of which is read once."""
    exact = dtype == torch.float32
    tall = 16 if rows <= 16 else 32 if exact else 64
    return TileConfig(tall, 16 if outputs <= 2048 else 64, 32 if exact else 128, 4, 3)


def linear_constants(rows: int, outputs: int, width: int, dtype: torch.dtype) -> dict[str, Any]:
    config = linear_config(rows, outputs, dtype)
    return {
        "K": width,
        "BLOCK_N": config.rows,
        "BLOCK_O": config.columns,
        "BLOCK_K": config.depth,
        "PRECISION": precision(dtype),
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }


def linear(
    h: Tensor, w: Tensor, addend: Tensor, out: Tensor, e: Tensor | None = None, fusion: int = PLAIN
) -> None:
    """out [B, O] = h [B, at least K] times w [O, K] transposed, plus addend [B, O] or [O]."""
    rows, (outputs, width) = len(h), w.shape
    constants = linear_constants(rows, outputs, width, w.dtype)
    grid = (
        triton.cdiv(outputs, constants["BLOCK_O"]),
        triton.cdiv(rows, constants["BLOCK_N"]),
    )
    decode_linear[grid](
        h, h if e is None else e, w, addend, out, rows, outputs,
        STRIDE=h.stride(0), FUSION=fusion, ROWS=addend.dim() == 2, **constants,
    )  # fmt: skip


@dataclass(frozen=True)
class DecodeWeights:
    """What a token needs; all of one dtype and device.

    Attributes:
        embedding: [V, D].
        layers: of the LSTM, each (w_ih, w_hh, b_ih, b_hh).
        projection: [D', H]; what multiplies e is not in it.
        vocabulary, bias: [V, D'], [V].
        gate: [H, H], the half of the gate that reads h; or None.
    """

    embedding: Tensor
    layers: Sequence[Sequence[Tensor]]
    projection: Tensor
    vocabulary: Tensor
    bias: Tensor
    gate: Tensor | None = None


class Decoder:
    """Steps of `batch` sequences on memory that stays where it is.

    Attributes:
        ids: the tokens that the next step reads, [B] int64.
        logits: of the last step, [B, V] float32.
        tokens: chosen so far, row by row, [steps, B] int64.
    """

    @torch.no_grad()
    def __init__(
        self,
        weights: DecodeWeights,
        batch: int,
        steps: int,
        *,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int = 0,
        eos: int = -1,
    ) -> None:
        """`temperature` 0 is greedy; `top_k` 0 samples from all tokens; `eos` -1 never ends."""
        self.weights, self.batch, self.top_k, self.eos = weights, batch, top_k, eos
        hidden, kind = weights.layers[0][1].shape[1], weights.embedding.dtype
        device, layers = weights.embedding.device, len(weights.layers)
        self.units = step_units(batch, hidden)
        self.hidden, self.width = hidden, padded(hidden, self.units)
        self.greedy, self.parity = temperature == 0, 0

        def zeros(*shape: int, dtype: torch.dtype = kind) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.ids = zeros(batch, dtype=torch.int64)
        self.tokens = zeros(steps, batch, dtype=torch.int64)
        self.done = zeros(batch, dtype=torch.uint8)
        self.count, self.seed = zeros(1, dtype=torch.int64), zeros(1, dtype=torch.int64) + seed
        self.temperature = zeros(1, dtype=torch.float32) + (temperature or 1.0)
        # h of even and odd steps: a step must not overwrite what it reads.
        self.h = zeros(2, layers, batch, self.width)
        self.c = zeros(layers, batch, self.width, dtype=torch.float32)
        self.gates = zeros(batch, 4 * self.width)
        self.mixed = zeros(batch, hidden)
        self.features = zeros(batch, len(weights.projection))
        self.logits = zeros(batch, len(weights.vocabulary), dtype=torch.float32)
        self.addend = zeros(batch, len(weights.projection))
        self.gate_addend = zeros(batch, hidden)
        self.e: Tensor | None = None
        fill = (0, self.width - hidden)
        self._inner = [self._packed(F.pad(layer[1], fill)) for layer in weights.layers]
        self._biases = [self._packed(layer[2] + layer[3]) for layer in weights.layers]
        self._outer = [self._packed(layer[0]) for layer in weights.layers[1:]]
        first = self._packed(weights.layers[0][0])
        self._table = F.linear(weights.embedding, first, self._biases[0])

    def _packed(self, w: Tensor) -> Tensor:
        return pack(w, self.units).contiguous()

    @torch.no_grad()
    def start(self, ids: Tensor, h: Tensor, c: Tensor) -> None:
        """Go on from the last tokens [B] and the state before them, each [B, L, H]."""
        self.parity = 0
        self.ids.copy_(ids)
        self.count.zero_()
        self.done.zero_()
        self.h[0, :, :, : self.hidden] = h.transpose(0, 1)
        self.c[:, :, : self.hidden] = c.transpose(0, 1)

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
        self.addend.copy_(addend.expand_as(self.addend))
        if e is not None:
            self.e = torch.empty_like(self.mixed) if self.e is None else self.e
            self.e.copy_(e)
        if gate_addend is not None:
            self.gate_addend.copy_(gate_addend)

    def step(self) -> None:
        """One token for every sequence; nothing here waits for the device."""
        before, after = self.h[self.parity], self.h[1 - self.parity]
        constants = forward_constants(self.batch, before.dtype, self.width, self.units)
        grid = (triton.cdiv(self.batch, constants["BLOCK_N"]) * (self.width // self.units),)
        for layer, w in enumerate(self._inner):
            if layer:
                linear(after[layer - 1], self._outer[layer - 1], self._biases[layer], self.gates)
            h, c, x = before[layer], self.c[layer], self.gates if layer else self._table
            rows_forward[grid](
                x, self.ids, h, w, c, c, after[layer], c, h, self.batch, self.batch,
                INPUT=OWN if layer else TABLE, HAS_KEEP=False, SAVE=False, **constants,
            )  # fmt: skip
        h, weights, fusion, e = after[-1], self.weights, PLAIN, None
        if weights.gate is not None:
            linear(h, weights.gate, self.gate_addend, self.mixed, self.e, GATE)
            h = self.mixed
        elif self.e is not None:
            fusion, e = MULTIPLY, self.e
        linear(h, weights.projection, self.addend, self.features, e, fusion)
        linear(self.features, weights.vocabulary, weights.bias, self.logits)
        size = self.logits.shape[1]
        decode_choose[(self.batch,)](
            self.logits, self.ids, self.tokens, self.done, self.count, self.seed, self.temperature,
            size, self.batch, len(self.tokens), self.top_k, self.eos,
            GREEDY=self.greedy, TOP_K=0 < self.top_k < size,
            BLOCK_V=triton.next_power_of_2(size), num_warps=8 if size <= 16_384 else 16,
            enable_fp_fusion=True,
        )  # fmt: skip
        self.count += 1
        self.parity = 1 - self.parity

    def state(self) -> tuple[Tensor, Tensor]:
        """(h, c) after the last step, each [B, L, H]."""
        h, c = (s[:, :, : self.hidden].transpose(0, 1) for s in (self.h[self.parity], self.c))
        return h.clone(), c.to(h.dtype)


class TokenGraph:
    """A `Decoder` whose step is a CUDA graph: one launch by the host, a token for each sequence."""

    def __init__(self, decoder: Decoder) -> None:
        """Captures an even and an odd step, which differ in where h lies.

        Raises:
            ValueError: the decoder's memory is not on a CUDA device.
        """
        if decoder.ids.device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, not {decoder.ids.device}")
        self.decoder = decoder
        kept = [t.clone() for t in self._mutable()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, which a capture must not
                decoder.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graphs = []
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                decoder.step()
            self.graphs.append(graph)
        for tensor, value in zip(self._mutable(), kept, strict=True):
            tensor.copy_(value)

    def _mutable(self) -> tuple[Tensor, ...]:
        d = self.decoder
        return d.ids, d.tokens, d.done, d.count, d.h, d.c

    def step(self) -> None:
        """As `Decoder.step`, by replaying the graph."""
        self.graphs[self.decoder.parity].replay()
        self.decoder.parity = 1 - self.decoder.parity
