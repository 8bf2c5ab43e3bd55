"""`evaluate`, `score`, `generate`: what a trained model says of text, and text of its own."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_model.commands.app import (
    AnyModel,
    Split,
    Store,
    TextFiles,
    command,
    output,
)


def _opened(lm: Any, chosen: AnyModel, store: Path | None) -> Any:
    from fusion_model.errors import FusionLMError

    if chosen.onnx is not None and store is not None:
        raise FusionLMError("--store does not go with --onnx: its embeddings are kept in memory")
    return lm.open_store(store)


@command
def evaluate(
    *,
    text: TextFiles,
    split: Split = "sentences",
    store: Store = None,
    chosen: AnyModel,
) -> None:
    """Perplexity of a text, in every unit that is in use."""
    from rich.console import Console
    from rich.table import Table

    from fusion_model.data.text import read_documents

    documents = read_documents(text, split)
    lm = chosen.open()
    with _opened(lm, chosen, store) as vectors:
        result = lm.perplexity(documents, vectors)
    name = chosen.model or chosen.onnx
    table = Table("measure", "value", title=f"{name} on {', '.join(text)}")
    table.columns[1].justify = "right"
    for name, value in (
        ("perplexity per token", f"{result.perplexity:.3f}"),
        ("perplexity per word", f"{result.word_perplexity:.3f}"),
        ("nats per token", f"{result.nats_per_token:.4f}"),
        ("bits per token", f"{result.bits_per_token:.4f}"),
        ("bits per character", f"{result.bits_per_character:.4f}"),
        ("2**nats (what the paper calls perplexity)", f"{result.paper_perplexity:.3f}"),
        ("tokens, sentence ends included", f"{result.tokens:,}"),
        ("words", f"{result.words:,}"),
        ("characters", f"{result.characters:,}"),
    ):
        table.add_row(name, value)
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

    documents = read_documents(text, split)
    lm = chosen.open()
    options: dict[str, Any] = {"context": context, "whitespace_correction": whitespace_correction}
    with _opened(lm, chosen, store) as vectors:
        words = lm.score(documents, store=vectors, **options)
    with output(out) as file:
        print("document\tsentence\tword\ttext\tbits\tnats\ttokens", file=file)
        for w in words:
            print(
                f"{w.document}\t{w.sentence}\t{w.word}\t{w.text}\t{w.bits:.6f}\t{w.nats:.6f}\t{w.tokens}",
                file=file,
            )


@command
def generate(
    *,
    prompt: Annotated[str, typer.Option(help="text to go on from; may be empty")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="sample from the k likeliest; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    beam: Annotated[int, typer.Option(min=1, help="beam search of this width")] = 1,
    seed: Annotated[int | None, typer.Option(help="repeat a sample")] = None,
    chosen: AnyModel,
) -> None:
    """Continue a prompt; the text appears as it is made (beam search: at the end)."""
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
    texts = lm.generate(prompt, seed=seed, **options)
    if beam > 1:
        print(texts[0])
