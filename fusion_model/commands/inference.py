"""`evaluate`, `score`, `generate`: what a trained model says of text, and text of its own."""

import csv
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fusion_model.commands.app import (
    AnyModel,
    Split,
    Store,
    TextFiles,
    check_outputs,
    command,
    output,
)
from fusion_model.devices import one_thread
from fusion_model.errors import FusionLMError

if TYPE_CHECKING:
    from fusion_model.data.text import Document

COLUMNS = (
    *("document", "sentence", "word", "text", "bits", "nats", "tokens"),
    *("start", "end", "unknown"),
)
COOLEST = 1e-4  # temperature: scores divided by less are no numbers any more
MEASURES = {
    "perplexity": ("perplexity per token", ".3f"),
    "word_perplexity": ("perplexity per word", ".3f"),
    "nats_per_token": ("nats per token", ".4f"),
    "bits_per_token": ("bits per token", ".4f"),
    "bits_per_character": ("bits per character", ".4f"),
    "paper_perplexity": ("2**nats (what the paper calls perplexity)", ".3f"),
    "tokens": ("tokens, sentence ends included", ",d"),
    "words": ("words", ",d"),
    "characters": ("characters", ",d"),
}


@contextmanager
def _share(
    chosen: AnyModel, documents: "Sequence[Document]", path: Path | None
) -> "Iterator[tuple[Any, Sequence[Document], Any, Callable[[Any], list[Any]]]]":
    """The model, this process's documents, the store, and what collects a part from each process
    (the main one gets all of them, in order, the others nothing): under torchrun there are several.
    """
    rank, world = 0, int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        from accelerate import PartialState

        from fusion_model.devices import resolve_device

        rank = PartialState(cpu=resolve_device(chosen.device) == "cpu").process_index
    lm = chosen.open()
    if chosen.onnx is not None and path is not None:
        raise FusionLMError("--store does not go with --onnx: its embeddings are kept in memory")
    if world == 1:
        with lm.open_store(path) as vectors:
            yield lm, documents, vectors, lambda part: [part]
        return
    from torch import distributed

    from fusion_model.data.corpus import Corpus
    from fusion_model.prefixes.distributed import cut, fill_store, gathered

    if lm.shuffle != "none":
        raise FusionLMError("a control with shuffled embeddings is scored by one process")
    if path is not None and lm.planner is not None:
        corpus = Corpus.from_documents(documents, lm.tokenizer)
        fill_store(corpus, lm.planner, path, rank, world)
    first, last = cut([len(d.text) for d in documents], rank, world)
    with lm.open_store(path, writable=False) as vectors:
        yield lm, documents[first:last], vectors, lambda part: gathered(part, rank, world)
    distributed.barrier()  # whoever ends first would take the connection down


@command
def evaluate(
    *,
    text: TextFiles,
    split: Split = "sentences",
    store: Store = None,
    as_json: Annotated[bool, typer.Option("--json", help="for machines")] = False,
    chosen: AnyModel,
) -> None:
    """Perplexity of a text, in every unit that is in use."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from fusion_model.data.text import read_documents
    from fusion_model.surprisal import sum_perplexity

    documents = read_documents(text, split)
    with _share(chosen, documents, store) as (lm, own, vectors, collect):
        parts = collect(lm.perplexity(own, vectors) if own else None)
    if not parts:
        return
    result = sum_perplexity([part for part in parts if part is not None])
    name = chosen.model or chosen.onnx
    measures: dict[str, float] = {measure: getattr(result, measure) for measure in MEASURES}
    if as_json:
        finite = {name: v if math.isfinite(v) else None for name, v in measures.items()}
        known = {"model": str(name), "text": text, **finite, "nats": result.nats}
        print(json.dumps(known, indent=1))
        return
    table = Table("measure", "value", title=escape(f"{name} on {', '.join(text)}"))
    table.columns[1].justify = "right"
    for measure, (label, form) in MEASURES.items():
        table.add_row(label, format(measures[measure], form))
    Console().print(table)


@command
def score(
    *,
    text: TextFiles,
    out: Annotated[Path | None, typer.Option(help="TSV file (default: standard output)")] = None,
    context: Annotated[
        str, typer.Option(help="sentence, or article: the state goes on")
    ] = "sentence",
    whitespace_correction: Annotated[
        bool, typer.Option(help="count a word's following space with it (Oh & Schuler 2024)")
    ] = False,
    split: Split = "sentences",
    store: Store = None,
    chosen: AnyModel,
) -> None:
    """Surprisal of every word as TSV, in bits and nats."""
    from fusion_model.data.text import read_documents

    written = None if out is None or str(out) == "-" else out
    check_outputs(written, texts=text)
    documents = read_documents(text, split)
    options: dict[str, Any] = {"context": context, "whitespace_correction": whitespace_correction}
    with _share(chosen, documents, store) as (lm, own, vectors, collect):
        parts = collect(lm.score(own, store=vectors, **options) if own else [])
    if not parts:
        return
    with output(out) as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(COLUMNS)
        for w in chain.from_iterable(parts):
            row = (w.document, w.sentence, w.word, w.text, f"{w.bits:.6f}", f"{w.nats:.6f}")
            table.writerow((*row, w.tokens, w.start, w.end, int(w.unknown)))


@command
def generate(
    *,
    prompt: Annotated[str, typer.Option(help="text to go on from; may be empty")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="sample from the k likeliest; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    beam: Annotated[int, typer.Option(min=1, help="beam search of this width")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="repeat a sample")] = None,
    chosen: AnyModel,
) -> None:
    """Continue a prompt; the text appears as it is made (beam search: at the end)."""
    for name, value in (("temperature", temperature), ("top-p", top_p)):
        if not math.isfinite(value):
            raise FusionLMError(f"--{name} must be a number, not {value}")
    if 0 < temperature < COOLEST:
        raise FusionLMError(f"--temperature must be 0, the likeliest token, or at least {COOLEST}")
    sampling = {"temperature": temperature not in (0, 1), "top-k": top_k > 0, "top-p": top_p < 1}
    if beam > 1 and any(sampling.values()):
        given = ", ".join(f"--{name}" for name, asked in sampling.items() if asked)
        raise FusionLMError(f"--beam does not sample: leave out {given}")
    lm = chosen.open()
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": beam}
    if beam == 1 and temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if beam == 1 and chosen.onnx is None:
        from transformers import TextStreamer

        options["streamer"] = TextStreamer(lm.tokenizer, skip_special_tokens=True)
    elif beam == 1:
        from fusion_model.export.runtime.tokenizer import TokenPrinter

        options["streamer"] = TokenPrinter(lm.tokenizer)
    # Under other policies prefixes are encoded anew, which is work for several threads.
    by_token = chosen.onnx is None and (not lm.planner or lm.planner.policy.name == "incremental")
    with one_thread() if by_token else nullcontext():
        texts = lm.generate(prompt, seed=seed, **options)
    if beam > 1:
        print(texts[0])
