"""One token of every sequence in plain PyTorch: the reference of the decoding kernels, and what
runs if they are wrong. Nothing here waits for the device, so that a CUDA graph can hold it.

Notation: B sequences, H hidden width, HP padded, D features, V vocabulary, L layers.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from fusion_model.kernels.triton.layout import unpack
from torch import Tensor

MASK = 0xFFFFFFFF


class Token(NamedTuple):
    """What a token reads, and what it writes.

    The weights and biases of the LSTM are packed, as `layout.pack` does.
    """

    ids: Tensor  # [B] int64: the input, replaced by the token chosen
    tokens: Tensor  # [steps, B] int64: row `made` is written
    done: Tensor  # [B] uint8: sequences that have ended
    made: Tensor  # [B] int64: tokens so far
    seed: Tensor  # [1] int64
    temperature: Tensor  # [1] float32
    h: Tensor  # [L, B, HP]
    h_next: Tensor  # [L, B, HP]
    c: Tensor  # [L, B, HP] float32
    table: Tensor  # [V, 4 HP]: input gates of every token
    inner: list[Tensor]  # a layer, [4 HP, HP]
    outer: list[Tensor]  # a layer but the first, [4 HP, H]
    biases: list[Tensor]  # a layer but the first, [4 HP]
    projection: Tensor  # [D, H]
    addend: Tensor  # [B, D]: bias of the projection, and what the prefix embedding adds to it
    vocabulary: Tensor  # [V, D]
    bias: Tensor  # [V]
    e: Tensor | None  # [B, H]: multiplies h, or is mixed with it if there is a gate
    gate: Tensor | None  # [H, H]
    gate_addend: Tensor | None  # [B, H]
    units: int
    greedy: bool
    top_k: int  # 0: all
    eos: int  # -1: none
    pad: int  # what a sequence goes on with after eos

    @property
    def written(self) -> tuple[str, ...]:
        return ("ids", "tokens", "done", "made", "h_next", "c")


def philox(seed: Tensor, words: Tensor, rows: Tensor, count: Tensor) -> Tensor:
    """First word of Philox 4x32-10 at counter (words, rows, count, 0), as int64."""
    c0, c1, c2, c3 = torch.broadcast_tensors(words, rows, count, torch.zeros_like(words))
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        # 64-bit products may wrap around: their bits are right.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((b >> 32) & MASK) ^ c1 ^ k0, b & MASK
        c2, c3 = ((a >> 32) & MASK) ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0


def gumbel(seed: Tensor, count: Tensor, size: int) -> Tensor:
    """Noise [B, size] float32 for step `count` [B]: the same for the same seed, step and row."""
    words = torch.arange(size, device=seed.device)
    rows = torch.arange(len(count), device=seed.device)[:, None]
    word = philox(seed, words, rows, count[:, None]).to(torch.int32)
    uniform = torch.where(word < 0, -word - 1, word).float() * 4.6566127342e-10
    return -torch.log(-torch.log(uniform.clamp(1e-10, 0.99999994)))


def scores(logits: Tensor, args: Token) -> Tensor:
    """What the token chosen is the greatest of, [B, V] float32; -inf where it may not be."""
    if args.greedy:
        return logits
    z = logits / args.temperature + gumbel(args.seed, args.made, logits.shape[1])
    if 0 < args.top_k < logits.shape[1]:
        bound = logits.topk(args.top_k).values[:, -1:]
        z = z.masked_fill(logits < bound, -float("inf"))
    return z


def plain_token(args: Token) -> Tensor:
    """One token for every sequence; returns the logits, [B, V] float32."""
    hidden, h = args.projection.shape[1], args.ids
    for layer, w in enumerate(args.inner):
        if layer:
            x = F.linear(h, args.outer[layer - 1], args.biases[layer - 1])
        else:
            x = args.table[args.ids]
        i, f, g, o = unpack((x + args.h[layer] @ w.t()).float(), args.units)
        args.c[layer] = torch.sigmoid(f) * args.c[layer] + torch.sigmoid(i) * torch.tanh(g)
        args.h_next[layer] = torch.sigmoid(o) * torch.tanh(args.c[layer])
        h = args.h_next[layer, :, :hidden]
    if args.gate is not None and args.gate_addend is not None and args.e is not None:
        share = torch.sigmoid(torch.addmm(args.gate_addend, h, args.gate.t()).float())
        h = (share * h + (1 - share) * args.e).to(h.dtype)
    elif args.e is not None:
        h = h * args.e
    features = torch.addmm(args.addend, h, args.projection.t())
    logits = F.linear(features, args.vocabulary, args.bias).float()
    chosen = scores(logits, args).argmax(-1)
    done = args.done.bool()
    chosen = torch.where(done, args.pad, chosen)
    args.done.copy_(done | (chosen == args.eos))
    args.ids.copy_(chosen)
    args.tokens.scatter_(0, args.made.clamp(max=len(args.tokens) - 1)[None], chosen[None])
    args.made.add_(1)
    return logits
