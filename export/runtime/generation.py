"""Choosing tokens: greedy, sampling and beam search, as `transformers` defines them.

Nothing here needs PyTorch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from fusion_model.export.runtime.steps import Steps

from fusion_model.errors import FusionLMError

OnTokens = Callable[[Sequence[int]], None]
NOT_YET = -1e9


@dataclass(frozen=True)
class GenerationOptions:
    """The options of `transformers.GenerationMixin.generate` that an export understands.

    Raises:
        FusionLMError: a value that makes no sense, by name.
    """

    max_new_tokens: int = 20
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0

    @classmethod
    def parse(cls, options: dict[str, Any]) -> "GenerationOptions":
        """From keyword arguments; an unknown one is refused by name."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise FusionLMError(
                    f"an exported model knows no generation option {name!r}: choose from "
                    f"{', '.join(known)}, streamer"
                )
        return cls(**options)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
            if getattr(self, name) < 1:
                raise FusionLMError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.do_sample and self.num_beams > 1:
            raise FusionLMError("beam search does not sample here: give num_beams or do_sample")
        if self.do_sample and self.temperature <= 0:
            raise FusionLMError(f"temperature must be above 0, not {self.temperature}")
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise FusionLMError("top_k must be at least 0, and top_p from 0 to 1")
        if not self.do_sample and self.num_return_sequences > self.num_beams:
            raise FusionLMError(
                "num_return_sequences above num_beams needs do_sample: the same text would come "
                "out several times"
            )


def generate_rows(
    steps: Steps,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    eos: int | None,
    generator: np.random.Generator,
    on_tokens: OnTokens | None = None,
) -> list[list[int]]:
    """Tokens of prompt and continuation, `num_return_sequences` rows a prompt.

    Args:
        steps: gives the scores.
        prompts: at least one token each.
        eos: ends a row, and is kept.
        generator: for sampling.
        on_tokens: called with the new tokens of the rows that are still growing.
    """
    if options.num_beams > 1:
        return [row for prompt in prompts for row in beam_search(steps, prompt, options, eos)]
    rows = [list(prompt) for prompt in prompts for _ in range(options.num_return_sequences)]
    alive = list(range(len(rows)))
    logits = steps.start(rows)
    for made in range(1, options.max_new_tokens + 1):
        chosen = choose(logits, options, generator)
        for row, token in zip(alive, chosen, strict=True):
            rows[row].append(token)
        if on_tokens:
            on_tokens(chosen)
        going = [i for i, token in enumerate(chosen) if token != eos]
        if not going or made == options.max_new_tokens:
            break
        alive = [alive[i] for i in going]
        logits = steps.advance([chosen[i] for i in going], going)
    return rows


def choose(
    logits: np.ndarray, options: GenerationOptions, generator: np.random.Generator
) -> list[int]:
    """A token for each row of scores [B, V]: the likeliest, or a sample."""
    if not options.do_sample:
        return [int(token) for token in logits.argmax(axis=1)]
    return [
        int(generator.choice(len(row), p=probabilities(row, options)))
        for row in logits.astype(np.float64)
    ]


def probabilities(scores: np.ndarray, options: GenerationOptions) -> np.ndarray:
    """What a sample is drawn from, [V] float64: temperature, then top k, then top p."""
    scores = scores / options.temperature
    if 0 < options.top_k < len(scores):
        least = np.partition(scores, -options.top_k)[-options.top_k]
        scores = np.where(scores < least, -np.inf, scores)
    p = np.exp(scores - scores.max())
    p /= p.sum()
    if options.top_p < 1:
        order = np.argsort(p, kind="stable")  # unlikeliest first
        dropped = order[np.cumsum(p[order]) <= 1 - options.top_p]
        p[np.setdiff1d(dropped, order[-1:])] = 0
        p /= p.sum()
    return p


def beam_search(
    steps: Steps, prompt: Sequence[int], options: GenerationOptions, eos: int | None
) -> list[list[int]]:
    """The best rows by log p / tokens ** length_penalty, `num_return_sequences` of them.

    Twice as many candidates as beams are looked at, so that enough go on where some end. A
    candidate that ends counts only if it is among the best `num_beams`. It is over when no
    running beam can, at its present length, beat the worst of the finished ones.
    """
    beams, start = options.num_beams, len(prompt)
    rows = [list(prompt)] * beams
    scores = np.full(beams, NOT_YET)
    scores[0] = 0  # all beams are the same prompt: one counts
    finished: list[tuple[float, list[int]]] = []
    logits = steps.start(rows)
    for made in range(1, options.max_new_tokens + 1):
        totals = (scores[:, None] + log_softmax(logits)).ravel()
        best = np.argsort(-totals, kind="stable")[: 2 * beams]
        sources, tokens = best // logits.shape[1], best % logits.shape[1]
        ends = (tokens == eos) | (made == options.max_new_tokens)
        for place in range(beams):
            if ends[place]:
                row = [*rows[sources[place]], int(tokens[place])]
                finished.append((float(totals[best[place]]) / made**options.length_penalty, row))
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        go_on = [i for i in range(len(best)) if not ends[i]][:beams]
        if not go_on:
            break
        scores = totals[best[go_on]]
        rows = [[*rows[sources[i]], int(tokens[i])] for i in go_on]
        worst = finished[-1][0] if len(finished) == beams else NOT_YET
        if scores[0] / made**options.length_penalty <= worst:
            break
        logits = steps.advance([int(tokens[i]) for i in go_on], [int(sources[i]) for i in go_on])
    assert all(len(row) > start for _, row in finished)
    return [row for _, row in finished[: options.num_return_sequences]]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, float64, over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    total: np.ndarray = np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted - total
