"""Decoding on the device at hand: against float64, 200 times the same, as a graph.

Notation: B sequences, H hidden width, D features, V vocabulary, L layers.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fusion_model.kernels.check.cases import TYPES, Named, Result, of_budget, same
from fusion_model.kernels.triton.decode_naive import Token, plain_token, scores
from torch import Tensor

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"greedy": True},
    "sampled": {"greedy": False},
    "top 40": {"greedy": False, "top_k": 40},
}


@dataclass(frozen=True)
class DecodeCase:
    """A decoder with random weights; `fusion` is plain, multiply or gate."""

    dtype: str
    batch: int
    hidden: int
    vocabulary: int
    fusion: str = "plain"
    layers: int = 1
    mode: str = "greedy"

    def __str__(self) -> str:
        shape = f"B{self.batch} H{self.hidden} V{self.vocabulary} L{self.layers}"
        return f"token {self.dtype} {shape} {self.fusion} {self.mode}"


def cases() -> list[DecodeCase]:
    found = []
    for t in TYPES:
        for fusion in ("plain", "multiply", "gate"):
            for mode in MODES:
                found.append(DecodeCase(t, 3, 650, 5003, fusion, 2, mode))
        found.append(DecodeCase(t, 1, 768, 8192))
        for batch in (16, 17, 64, 100):
            found.append(DecodeCase(t, batch, 768, 8192, "gate", 1, "top 40"))
        found.append(DecodeCase(t, 2, 1500, 50_257, "plain", 2, "sampled"))
    return found


def decoder(case: DecodeCase, device: torch.device, steps: int = 64, **options: Any) -> Any:
    """A `decoder.Decoder` in the middle of a sequence, and what puts it back there."""
    from fusion_model.kernels.triton.decoder import Decoder, DecodeWeights

    generator = torch.Generator().manual_seed(0)
    size, hidden, batch = case.hidden // 2, case.hidden, case.batch

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator) * scale
        return drawn.to(device, TYPES[case.dtype])

    layers = []
    for layer in range(case.layers):
        inner = hidden if layer else size
        shapes = ((4 * hidden, inner), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,))
        layers.append([random(*shape, scale=hidden**-0.5) for shape in shapes])
    weights = DecodeWeights(
        random(case.vocabulary, size),
        layers,
        random(size, hidden, scale=hidden**-0.5),
        random(case.vocabulary, size, scale=2 * size**-0.5),
        random(case.vocabulary),
        random(hidden, hidden, scale=hidden**-0.5) if case.fusion == "gate" else None,
        case.fusion == "multiply",
    )
    found = Decoder(weights, batch, steps, **(MODES[case.mode] | options))
    found.set_prefix(random(batch, size), random(batch, hidden), random(batch, hidden))
    ids = torch.randint(case.vocabulary, (batch,), generator=generator).to(device)
    state = random(batch, case.layers, hidden), random(batch, case.layers, hidden)
    start = partial(found.start, ids, *state, seed=3, temperature=0.7)
    start()
    return found, start


def copied(token: Token, dtype: torch.dtype | None = None) -> Token:
    """On memory of its own, floating-point tensors in `dtype` if one is given."""

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        return value.to(dtype if dtype and value.is_floating_point() else value.dtype, copy=True)

    return Token(*map(of, token))


def compare(case: DecodeCase, device: torch.device) -> Result:
    """State and logits as `gpu_cases.compare`; the token is what PyTorch chooses of the logits."""
    from fusion_model.kernels.triton.decode import kernel_token

    token = decoder(case, device)[0].steps[0]
    found = []
    for run, wide in ((plain_token, torch.float64), (plain_token, None), (kernel_token, None)):
        args = copied(token, wide)
        found.append([run(args), args.h_next, args.c])
    share = of_budget(found[2], found[1], found[0], case.dtype)
    best = scores(found[2][0].float(), token)
    lost = float((best.amax(-1) - best.gather(1, args.ids[:, None])[:, 0]).max())
    right = lost <= 1e-3  # two scores this close may change places: logarithms differ in a bit
    return {
        "ok": right and share <= 1,
        "of_budget": share,
        "plan": "token chosen" if right else f"another token, {lost:.2g} below the best",
    }


def _ran(runner: Any, start: Any, of: Any, *runs: int) -> list[Tensor]:
    start()
    for count in runs:
        runner.run(count)
    return [of.tokens.clone(), of.done.clone(), of.logits.clone(), *of.state()]


def repeated(case: DecodeCase, device: torch.device, times: int, steps: int = 4) -> Result:
    one, start = decoder(case, device, steps)
    found = (_ran(one, start, one, steps) for _ in range(times))
    return same(next(found), found)


def replayed(case: DecodeCase, device: torch.device, steps: int = 100) -> Result:
    """Graphs of many tokens and of one, in two splits, against launches; some sequences end."""
    from fusion_model.kernels.triton.decoder import TokenGraph

    one, start = decoder(case, device, steps, eos=7, pad=0)
    expected = _ran(one, start, one, steps)
    graph = TokenGraph(one)
    return same(expected, (_ran(graph, start, one, n, steps - n) for n in (1, steps // 2)))


REPEATED = [DecodeCase("bf16", b, 768, 8192, "gate", 2, mode) for b in (1, 16) for mode in MODES]


def check(device: torch.device) -> list[Named]:
    return [(str(case), partial(compare, case, device)) for case in cases()]


def repeats(device: torch.device, times: int = 200) -> list[Named]:
    return [(f"{times} times {case}", partial(repeated, case, device, times)) for case in REPEATED]


def replays(device: torch.device, steps: int = 100) -> list[Named]:
    return [
        (f"{steps} graphs of a {case}", partial(replayed, case, device, steps)) for case in REPEATED
    ]
