"""Latency token by token of a model on a text, split into its stages.

Every prompt runs twice, in turns: plainly, with nothing but a tick a token, and with spans
around the stages. What the spans add is thereby measured, and the stages' shares are of a whole
that was also measured without them. Host is what no stage accounts for.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from fusion_model.benchmarks.profile.engines import HOST, PARTS, Engine
from fusion_model.benchmarks.profile.spans import Recorder, Span

from fusion_model.data.text import Document
from fusion_model.errors import FusionLMError

FEWEST_WORDS = 10
Progress = Callable[[int, str], None]


@dataclass
class Pass:
    """Latencies of one call, in seconds.

    Attributes:
        tokens: of each token of generation (the first includes reading the prompt), or of the
            call as one for scoring; then what was left after the last one.
        parts: of each of those, seconds by stage; empty for a plain pass.
        wall: of the call, measured around it.
        start: of the call, on the recorder's clock.
        first_position: tokens that the prompt holds.
        words: scored.
    """

    tokens: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    wall: float = 0.0
    start: float = 0.0
    first_position: int = 0
    words: int = 0


def one_pass(recorder: Recorder, call: Callable[[Callable[[], None]], Any], spans: bool) -> Pass:
    """Time a call that ticks at each token.

    Args:
        call: gets the tick.
        spans: whether stages are recorded; their exclusive times are then taken at each tick.
    """
    found = Pass(start=recorder.now())
    recorder.take()
    last = found.start

    def tick() -> None:
        nonlocal last
        now = recorder.now()
        found.tokens.append(now - last)
        if spans:
            parts = recorder.take()
            parts[HOST] = now - last - sum(parts.values())
            found.parts.append(parts)
        last = now

    out = call(tick)
    tick()  # what follows the last token
    found.wall = recorder.now() - found.start
    found.words = out if isinstance(out, int) else 0
    return found


def check_words(sentences: Sequence[str], least: int, what: str) -> None:
    """Raise `FusionLMError` for a text of fewer than `least` words."""
    total = sum(len(s.split()) for s in sentences)
    if total < least:
        plural = "" if total == 1 else "s"
        raise FusionLMError(f"the text has {total} word{plural}: {what} needs at least {least}")


def prompts_of(sentences: Sequence[str], count: int, words: int) -> list[str]:
    """Openings of sentences, `words` words each; of none so long, the longest sentence.

    Raises:
        FusionLMError: the text has fewer than `FEWEST_WORDS` words.
    """
    check_words(sentences, FEWEST_WORDS, "a profile")
    openings = [" ".join(s.split()[:words]) for s in sentences if len(s.split()) >= words]
    if not openings:
        openings = [max(sentences, key=lambda s: len(s.split()))]
    unique = list(dict.fromkeys(openings))
    return [unique[i % len(unique)] for i in range(count)]


@dataclass
class Profile:
    """All passes of a model, warm."""

    generation: list[tuple[Pass, Pass]]
    scoring: list[tuple[Pass, Pass]]
    spans: list[Span]


def profile(
    engine: Engine,
    sentences: Sequence[str],
    *,
    runs: int = 12,
    tokens: int = 48,
    batch: int = 1,
    prompt_words: int = 8,
    recorder: Recorder | None = None,
    progress: Progress = lambda done, text: None,
) -> Profile:
    """Generate and score, each prompt and each batch of sentences once plainly and once in parts.

    Args:
        sentences: of the text.
        runs: prompts (times `batch` rows each), and at most so many batches of sentences.
        tokens: generated after each.
        batch: rows that generate together, and sentences scored together.

    Raises:
        FusionLMError: a text too short.
    """
    recorder = recorder or Recorder()
    prompts = prompts_of(sentences, batch * (runs + 1), prompt_words)
    groups = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    engine.generate(groups[0], min(tokens, 8), lambda: None)  # warm
    generation, scoring = [], []
    for i, group in enumerate(groups[1:]):
        pair = _pair(engine, recorder, partial(engine.generate, group, tokens), i)
        for found in pair:
            found.first_position = max(len(engine.lm.prompt_row(p)) for p in group)
        generation.append(pair)
        progress(i + 1, "generation")
    chunks = [sentences[i : i + batch] for i in range(0, len(sentences), batch)][:runs]
    _score(engine, chunks[0], lambda: None)  # warm
    for i, chunk in enumerate(chunks):
        scoring.append(_pair(engine, recorder, partial(_score, engine, chunk), i))
        progress(runs + i + 1, "scoring")
    return Profile(generation, scoring, recorder.spans)


def _score(engine: Engine, sentences: Sequence[str], tick: Callable[[], None]) -> int:
    """The number of words; all positions at once: nothing to tick at."""
    return len(engine.lm.score([Document("text", list(sentences))]))


def _pair(
    engine: Engine, recorder: Recorder, call: Callable[[Callable[[], None]], Any], turn: int
) -> tuple[Pass, Pass]:
    """(plain, in parts); which comes first alternates."""
    found = {}
    for spans in (False, True) if turn % 2 == 0 else (True, False):
        engine.forget()
        with engine.stages(recorder) if spans else nullcontext():
            found[spans] = one_pass(recorder, call, spans)
    return found[False], found[True]


def share_out(pairs: Sequence[tuple[Pass, Pass]], share: float, of: str, to: str) -> None:
    """A share of a part belongs to another."""
    for _, split in pairs:
        for parts in split.parts:
            moved = share * parts.get(of, 0.0)
            parts |= {of: parts.get(of, 0.0) - moved, to: parts.get(to, 0.0) + moved}


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles, mean and jitter (standard deviation), in milliseconds."""
    times = 1e3 * np.asarray(seconds)
    p50, p90, p99 = np.percentile(times, [50, 90, 99])
    named = {"p50": p50, "p90": p90, "p99": p99, "mean": times.mean(), "jitter": times.std()}
    return {name: round(float(value), 4) for name, value in named.items()}


def _mean_parts(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    return {
        name: round(1e3 * float(np.mean([p.get(name, 0.0) for p in parts])), 4) for name in PARTS
    }


def summary(found: Profile, batch: int) -> dict[str, Any]:
    """Everything a profile says, in milliseconds, for JSON.

    `whole_ms` is the wall time around the plain passes; `parts_over_whole` is the sum of all
    parts of a pass over the wall time of its plain twin, the median over all pairs: 1, but for
    what the spans cost and what else the machine does.
    """
    plain, split = zip(*found.generation, strict=True)
    later = [p.tokens[1:-1] for p in plain]
    first_parts = _mean_parts([p.parts[0] for p in split])
    token_parts = _mean_parts([part for p in split for part in p.parts[1:-1]])
    rest = [t for tokens in later for t in tokens]
    positions = []
    for i in range(min(len(tokens) for tokens in later)):
        own = [tokens[i] for tokens in later]
        at = int(np.median([p.first_position for p in plain])) + i + 1
        parts = _mean_parts([p.parts[i + 1] for p in split])
        positions.append({"position": at} | _spread(own) | {"parts": parts})
    generation = {
        "first_token_ms": _spread([p.tokens[0] for p in plain]),
        "token_ms": _spread(rest),
        "tokens_per_second": round(batch / float(np.mean(rest)), 2),
        "first_token_parts_ms": first_parts,
        "token_parts_ms": token_parts,
        "by_position": positions,
    }
    return {
        "generation": generation | _sums(found.generation),
        "scoring": _scoring(found.scoring) | _sums(found.scoring),
    }


def _scoring(pairs: Sequence[tuple[Pass, Pass]]) -> dict[str, Any]:
    plain, split = zip(*pairs, strict=True)
    words = sum(p.words for p in plain)
    parts = _mean_parts([part for p in split for part in p.parts])
    calls = sum(len(p.parts) for p in split)
    return {
        "call_ms": _spread([p.wall for p in plain]),
        "words": words,
        "words_per_second": round(words / sum(p.wall for p in plain), 1),
        "word_ms": round(1e3 * sum(p.wall for p in plain) / words, 4),
        "word_parts_ms": {name: round(v * calls / words, 4) for name, v in parts.items()},
    }


def _sums(pairs: Sequence[tuple[Pass, Pass]]) -> dict[str, float]:
    whole = sum(plain.wall for plain, _ in pairs)
    shares = [sum(sum(p.values()) for p in split.parts) / plain.wall for plain, split in pairs]
    return {
        "whole_ms": round(1e3 * whole, 3),
        "parts_over_whole": round(float(np.median(shares)), 4),
    }


def trace(found: Profile) -> dict[str, Any]:
    """For Perfetto (ui.perfetto.dev) or chrome://tracing: tokens on one track, stages on another.

    Only passes in parts are in it.
    """
    events: list[dict[str, Any]] = []

    def event(name: str, start: float, seconds: float, track: int, **facts: Any) -> None:
        times = {"ts": round(1e6 * start, 3), "dur": round(1e6 * seconds, 3)}
        events.append({"name": name, "ph": "X", "pid": 1, "tid": track, "args": facts} | times)

    for tid, name in ((1, "tokens"), (2, "stages")):
        meta = {"name": "thread_name", "ph": "M", "pid": 1, "tid": tid}
        events.append(meta | {"args": {"name": name}})
    for label, pairs in (("token", found.generation), ("score", found.scoring)):
        for _, split in pairs:
            at = split.start
            for i, seconds in enumerate(split.tokens):
                name = f"{label} {i}" if i < len(split.tokens) - 1 else "end of call"
                event(name, at, seconds, 1, position=split.first_position + i)
                at += seconds
    for span in found.spans:
        event(span.name, span.start, span.end - span.start, 2)
    return {"traceEvents": events, "displayTimeUnit": "ms"}
