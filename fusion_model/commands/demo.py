"""`fusion-lm demo`: the main job in small, on a text that the shipped model never saw."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from fusion_model.commands.app import command
from fusion_model.devices import one_thread

if TYPE_CHECKING:
    from fusion_model.language_model import FusionLM

SAMPLE = Path(__file__).parents[1] / "samples" / "thursday.txt"  # G. K. Chesterton, 1908
PROMPT = "The old gentleman with the white beard"
SENTENCE = f"{PROMPT} sat down in his chair, and said nothing."
MODEL = "fusion-lm-small"
TOKENS = 60  # timed, one after the other


@command
def demo() -> None:
    """What the model does, on real sentences: surprisal, a continuation, perplexity, latency."""
    from fusion_model.data.text import Document, read_text, split_sentences
    from fusion_model.loading import load

    console = Console(highlight=False)
    console.print(f"[bold]fusion-lm demo[/]: {MODEL} with all-MiniLM-L6-v2, on this CPU\n")
    models = {"unfused": load(f"{MODEL}-unfused"), "fused": load(MODEL)}
    fused = models["fused"]
    sentences = split_sentences(read_text(SAMPLE))
    console.print("[bold]1. Surprisal of each word, in bits[/]")
    table = _table("word", "unfused", "fused")
    table.add_column("")
    words = [lm.score(" ".join(sentences[:2])) for lm in models.values()]
    for theirs, ours in zip(*words, strict=True):
        bar = f"[cyan]{'█' * round(ours.bits) or '▏'}[/]"
        table.add_row(ours.text, f"{theirs.bits:.1f}", f"{ours.bits:.1f}", bar)
    console.print(table)

    console.print("\n[bold]2. A continuation[/]")
    text = fused.generate(
        PROMPT, seed=3, max_new_tokens=40, do_sample=True, temperature=0.8, top_k=50
    )
    console.print(f"   [dim]{PROMPT}[/]{text[0].removeprefix(PROMPT)}")

    table = _table("model", "per token", "per word", "bits per character")
    for name, lm in models.items():
        started = time.perf_counter()
        p = lm.perplexity([Document("sample", sentences)])
        rate = p.tokens / (time.perf_counter() - started)
        cells = f"{p.perplexity:.1f}", f"{p.word_perplexity:.1f}", f"{p.bits_per_character:.3f}"
        table.add_row(name, *cells)
    console.print(f"\n[bold]3. Perplexity of {SAMPLE.name}, {p.words} words unseen in training[/]")
    console.print(table)
    console.print(f"   scored with its prefix embeddings: {rate:,.0f} tokens/s")

    console.print("\n[bold]4. Generation, one token at a time, on one thread[/]")
    table = _table("model", "tokens/s", "p50 ms", "p99 ms", "of it encoder", "of it LSTM")
    models["fused, policy every"] = load(MODEL, policy="every")
    for name, lm in models.items():
        with one_thread():
            table.add_row(name, *_latency(lm))
    console.print(table)
    console.print("   every: each prefix encoded anew; the model itself goes on from the last one")
    print(f"\nNext: fusion-lm score {MODEL} --text YOUR.txt, or fusion-lm train --help")
    print(f"Without PyTorch: fusion-lm export {MODEL} OUT --encoder")


def _table(*columns: str) -> Table:
    table = Table(box=None)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table


def _latency(lm: "FusionLM") -> Sequence[str]:
    """Tokens a second, and milliseconds of a token, greedy."""
    from fusion_model.benchmarks.profile.engines import ENCODER, LSTM, VOCABULARY, TorchEngine
    from fusion_model.benchmarks.profile.latency import profile, summary

    engine, words = TorchEngine(lm), len(PROMPT.split())
    found = profile(engine, [SENTENCE], runs=1, tokens=TOKENS, prompt_words=words)
    figures = summary(found, 1)["generation"]
    parts, spread = figures["token_parts_ms"], figures["token_ms"]
    times = spread["p50"], spread["p99"], parts[ENCODER], parts[LSTM] + parts[VOCABULARY]
    return f"{figures['tokens_per_second']:,.0f}", *(f"{ms:.2f}" for ms in times)
