"""`fusion-lm demo`: the main job in small, on a text that the shipped model never saw."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fusion_model.data.text import Document, read_text, split_sentences
from fusion_model.language_model import FusionLM
from fusion_model.loading import load
from fusion_model.surprisal import Perplexity, WordScore

SAMPLE = Path(__file__).parents[1] / "samples" / "thursday.txt"  # G. K. Chesterton, 1908
PROMPT = "The old gentleman with the white beard"
MODEL = "fusion-lm-small"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of each generated token, by what they were spent on."""

    encoder: np.ndarray
    model: np.ndarray


def run_demo() -> None:
    """Print the demo to standard output."""
    console = Console()
    console.print(f"[bold]fusion-lm demo[/]: {MODEL} with all-MiniLM-L6-v2, on this CPU\n")
    fused, unfused = load(MODEL), load(f"{MODEL}-unfused")
    sentences = split_sentences(read_text(SAMPLE))
    shown = " ".join(sentences[:2])
    pair = (fused.score(shown), unfused.score(shown))
    console.print("[bold]1. Surprisal of each word, in bits[/]")
    console.print(surprisal_table(*pair))

    console.print("\n[bold]2. A continuation[/]")
    text = fused.generate(
        PROMPT, seed=3, max_new_tokens=40, do_sample=True, temperature=0.8, top_k=50
    )
    console.print(f"   [dim]{PROMPT}[/]{text[0].removeprefix(PROMPT)}", highlight=False)

    document = [Document("sample", sentences)]
    started = time.perf_counter()
    with_fusion = fused.perplexity(document)
    seconds = time.perf_counter() - started
    console.print(
        f"\n[bold]3. Perplexity of {SAMPLE.name}, {with_fusion.words} words unseen in training[/]",
        highlight=False,
    )
    console.print(perplexity_table(with_fusion, unfused.perplexity(document)))
    console.print(
        f"   scored with exact prefix embeddings: {with_fusion.tokens / seconds:,.0f} tokens/s"
    )
    console.print("\n[bold]4. Generation, one token at a time[/]")
    console.print(latency_table(measure_latency(fused, PROMPT), measure_latency(unfused, PROMPT)))


def surprisal_table(fused: list[WordScore], unfused: list[WordScore]) -> Table:
    """A row a word: both models' bits, and the fused model's as a bar."""
    table = Table(box=None)
    table.add_column("word")
    table.add_column("unfused", justify="right")
    table.add_column("fused", justify="right")
    table.add_column("")
    for a, b in zip(fused, unfused, strict=True):
        bar = "█" * round(a.bits) or "▏"
        table.add_row(a.text, f"{b.bits:.1f}", f"{a.bits:.1f}", f"[cyan]{bar}[/]")
    return table


def perplexity_table(fused: Perplexity, unfused: Perplexity) -> Table:
    """Both models on the sample."""
    table = Table(box=None)
    table.add_column("model")
    for name in ("per token", "per word", "bits per character"):
        table.add_column(name, justify="right")
    for name, p in (("unfused", unfused), ("fused", fused)):
        table.add_row(
            name, f"{p.perplexity:.1f}", f"{p.word_perplexity:.1f}", f"{p.bits_per_character:.3f}"
        )
    return table


@torch.inference_mode()
def measure_latency(lm: FusionLM, prompt: str, tokens: int = 60, warmup: int = 5) -> Latency:
    """Time greedy generation, token by token, each prefix encoded exactly."""
    ids = lm.prompt_ids(prompt)
    state = None
    fed = ids
    encoder, model = [], []
    for _ in range(warmup + tokens):
        started = time.perf_counter()
        e = None
        if lm.model.prefix_encoder is not None:
            start = ids.shape[1] - fed.shape[1]
            e = lm.model.prefix_encoder(ids, torch.ones_like(ids), start)
        encoded = time.perf_counter()
        out = lm.model(fed, prefix_embeds=e, state=state, logits_to_keep=1)
        assert out.logits is not None
        fed, state = out.logits[:, -1].argmax(-1, keepdim=True), out.state
        ids = torch.cat([ids, fed], dim=1)
        model.append(time.perf_counter() - encoded)
        encoder.append(encoded - started)
    return Latency(1e3 * np.array(encoder[warmup:]), 1e3 * np.array(model[warmup:]))


def latency_table(fused: Latency, unfused: Latency) -> Table:
    """Tokens a second and percentiles in milliseconds a token."""
    table = Table(box=None)
    table.add_column("model")
    for name in ("tokens/s", "p50 ms", "p99 ms", "of it encoder", "of it LSTM"):
        table.add_column(name, justify="right")
    for name, latency in (("unfused", unfused), ("fused", fused)):
        total = latency.encoder + latency.model
        p50, p99 = np.percentile(total, [50, 99])
        table.add_row(
            name,
            f"{1e3 / total.mean():,.0f}",
            f"{p50:.2f}",
            f"{p99:.2f}",
            f"{np.median(latency.encoder):.2f}",
            f"{np.median(latency.model):.2f}",
        )
    return table
