"""What each encoding policy costs: prefixes a second, encoder tokens a prefix, memory; and the
time of a generated token against its position.

    python -m fusion_model.benchmarks.policies [--text FILE] [--out DIR] [--part PART]
        [--device cuda] [--quick]

The prefixes are those of the text's tokens under `fusion-lm-small`, all-MiniLM-L6-v2, pooling
`mean` (`last@3+mean@3` where it says so). All ways run in turn in one process; a way's result is
held against the encoder called one prefix at a time, where its policy is exact.
"""

import ctypes
import gc
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from fusion_model.benchmarks.measure.machine import describe, where
from fusion_model.benchmarks.suite.encoding import one_at_a_time, sentence_transformers
from fusion_model.benchmarks.suite.work import Unavailable
from transformers.utils import logging

from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document, read_text, split_sentences
from fusion_model.encoders import load_encoder
from fusion_model.encoders.pretrained import HFEncoder, counted_tokens
from fusion_model.files import write_text
from fusion_model.loading import load_model
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.prefixes.stream import PrefixStream
from fusion_model.prefixes.views import prefix_texts
from fusion_model.progress import note

TEXT = Path(__file__).parent / "thursday.txt"
DTYPES = ("float32", "bfloat16")
BATCHES = (8, 32, 128)
POLICIES = (
    ("every", "mean"),
    ("word", "mean"),
    ("stride:4", "mean"),
    ("sentence", "mean"),
    ("incremental", "mean"),
    ("incremental", "last@3+mean@3"),
    ("incremental+refresh:16", "mean"),
)
GENERATED = ("every", "incremental", "incremental+refresh:16")
PARTS = (*DTYPES, "generation")
ONE_AT_A_TIME = 400  # prefixes of them, spread over the text


def measure_encoding(
    text: str, dtype: str, device: str = "cpu", quick: bool = False
) -> list[dict[str, Any]]:
    """A row for each way: `way`, `pooling`, prefixes a second, tokens a prefix, memory."""
    tokenizer = load_model("fusion-lm-small")[1]
    corpus = Corpus.from_documents([Document("text", split_sentences(text))], tokenizer)
    texts = [t.strip() for s in corpus.sentences for t in prefix_texts(tokenizer, s[1:-1])]
    step = max(len(texts) // (40 if quick else ONE_AT_A_TIME), 1)
    few = texts[::step]
    rows = []

    def add(
        way: str,
        call: Callable[[], Any],
        pooling: str = "mean",
        count: int = len(texts),
        tokens: Sequence[int] = (),
    ) -> None:
        """`tokens` is filled by the call."""
        seconds, peak, working = _timed(call, device)
        note(f"{way} {pooling}: {count / seconds:.0f} prefixes/s")
        row = {"way": way, "pooling": pooling, "prefixes_per_second": count / seconds}
        row["tokens_per_prefix"] = sum(tokens) / count if tokens else None
        rows.append(row | {"peak_mb": peak, "working_mb": working})

    alone = one_at_a_time(dtype, device)
    add("one at a time", partial(alone, few), count=len(few))
    expected = alone(few)
    for size in BATCHES:
        try:
            theirs = sentence_transformers(dtype, device, size)
        except Unavailable as error:
            note(str(error))
            break
        _agree(theirs(few), expected, dtype)
        add(f"sentence-transformers, batch {size}", partial(theirs, texts))
    previous: list[Sequence[int]] = [(), *corpus.sentences[:-1]]
    for policy, pooling in POLICIES:
        encoder = load_encoder("minilm", pooling, dtype=dtype, policy=policy, device=device)
        assert isinstance(encoder, HFEncoder)
        planner = PrefixPlanner(encoder, tokenizer)

        def encode(planner: PrefixPlanner = planner) -> torch.Tensor:
            found: torch.Tensor = planner.encoder.encode(planner.inputs(corpus.sentences, previous))
            return found

        if policy == "every":
            _agree(encode()[::step], expected, dtype)
        encoder.encode(planner.inputs(corpus.sentences[:1]))  # the trial of the first batch
        with counted_tokens(encoder) as tokens:
            add(policy, encode, pooling, tokens=tokens)
    return rows


def measure_generation(text: str, tokens: int, device: str = "cpu") -> dict[str, list[float]]:
    """Milliseconds to encode the prefix of each further token of one long sentence, by policy.

    Every policy's vectors are held against those of the whole sentence at once.
    """
    tokenizer = load_model("fusion-lm-small")[1]
    ids = [1, *tokenizer(" ".join(text.split()), verbose=False)["input_ids"][:tokens]]
    found = {}
    for policy in GENERATED:
        encoder = load_encoder("minilm", "static+mean", policy=policy, device=device)
        planner = PrefixPlanner(encoder, tokenizer)
        stream = PrefixStream(planner)
        stream.of_rows([ids[:5]], 0)
        times, vectors = [], []
        for t in range(6, len(ids) + 1):
            began = time.perf_counter()
            vectors += stream.step([ids[:t]])
            times.append((time.perf_counter() - began) * 1e3)
        _agree(torch.stack(vectors), encoder.encode(planner.inputs([ids]))[5:], "float32")
        found[policy] = times
    return found


def _agree(found: torch.Tensor, expected: torch.Tensor, dtype: str) -> None:
    tolerance = 1e-5 if dtype == "float32" else 0.05
    torch.testing.assert_close(found.cpu(), expected.cpu(), atol=tolerance, rtol=tolerance)


def _timed(call: Callable[[], Any], device: str) -> tuple[float, float | None, float | None]:
    """Seconds; the peak of memory, and how far above what was held before, MB.

    On the CPU of the process (Linux), else of PyTorch's memory on the GPU.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated() / 2**20
        return time.perf_counter() - began, most, most - before
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is the system's again
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    held = _status("VmRSS")
    began = time.perf_counter()
    call()
    seconds = time.perf_counter() - began
    peak = _status("VmHWM")
    return seconds, peak, None if held is None or peak is None else peak - held


def _status(name: str) -> float | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def table(results: dict[str, Any]) -> str:
    """Markdown: both dtypes side by side, ratios to the best of sentence-transformers.

    Working memory is the process's peak above what it held before: weights not counted.
    """
    lines = [
        "| way | pooling | encoder tokens a prefix | "
        + " | ".join(f"{d}: prefixes/s | ratio | working MB" for d in results["encoding"])
        + " |",
        "|---|---|--:" + "|--:|--:|--:" * len(results["encoding"]) + "|",
    ]
    best = {
        dtype: max(
            (r["prefixes_per_second"] for r in rows if r["way"].startswith("sentence-")),
            default=rows[0]["prefixes_per_second"],
        )
        for dtype, rows in results["encoding"].items()
    }
    for group in zip(*results["encoding"].values(), strict=True):
        row = group[0]
        tokens = row["tokens_per_prefix"]
        cells = [row["way"], row["pooling"], "" if tokens is None else f"{tokens:.2f}"]
        for dtype, of_dtype in zip(best, group, strict=True):
            rate = of_dtype["prefixes_per_second"]
            working = of_dtype["working_mb"]
            memory = "" if working is None else f"{working:,.0f}"
            cells += [f"{rate:,.0f}", f"{rate / best[dtype]:.2f}×", memory]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_generation(results: dict[str, Any], path: Path) -> None:
    """Time of a token's prefix against its position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for policy, times in results["generation"].items():
        smooth = [float(np.median(times[max(i - 5, 0) : i + 6])) for i in range(len(times))]
        axes.plot(range(6, 6 + len(smooth)), smooth, label=policy)
    axes.set_xlabel("position in the sentence (tokens)")
    axes.set_ylabel("encoding one prefix (ms, median of 11)")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(where(results["machine"]), fontsize=9)
    figure.savefig(path)


def main(
    text: Annotated[Path, typer.Option(help="plain text")] = TEXT,
    out: Annotated[Path, typer.Option(help="folder of the results")] = Path("policies"),
    part: Annotated[
        list[str] | None, typer.Option(help=f"only this one of {', '.join(PARTS)}; repeatable")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    quick: Annotated[bool, typer.Option(help="the text's first 3 000 characters only")] = False,
) -> None:
    """Measure, and write `policies.json`, `policies.md` and `policies.svg` once all is there."""
    logging.disable_progress_bar()
    parts = part or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        raise typer.BadParameter(f"{unknown.pop()!r}: choose of {', '.join(PARTS)}")
    read = read_text(text)
    read = read[:3000] if quick else read
    saved = out / "policies.json"
    results: dict[str, Any] = {"encoding": {}}
    if part and saved.exists():
        results = json.loads(saved.read_text())
    results |= {"machine": describe(device), "text": text.name}
    out.mkdir(parents=True, exist_ok=True)
    for name in parts:
        if name == "generation":
            results[name] = measure_generation(read, 60 if quick else 400, device)
        else:
            done = results["encoding"] | {name: measure_encoding(read, name, device, quick)}
            results["encoding"] = {dtype: done[dtype] for dtype in DTYPES if dtype in done}
        write_text(saved, json.dumps(results, indent=1) + "\n")
    if set(results["encoding"]) != set(DTYPES) or "generation" not in results:
        return
    write_text(out / "policies.md", f"{table(results)}\n\n{where(results['machine'])}\n")
    plot_generation(results, out / "policies.svg")
    print(table(results))


if __name__ == "__main__":
    typer.run(main)
