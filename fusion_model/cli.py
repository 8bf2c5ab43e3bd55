"""The command line. Each command imports what it needs, so that `--help` answers at once."""

import dataclasses
import errno
import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

app = typer.Typer(
    name="fusion-lm",
    help="LSTM language models that fuse embeddings of the prefix from a pretrained encoder.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="folder, hub name, or fusion-lm-small, which ships")]
TextFiles = Annotated[
    list[str],
    typer.Option("--text", help="text file, folder of .txt files, or hf:NAME; repeatable"),
]
Split = Annotated[str, typer.Option(help="how text becomes sentences: sentences, lines")]
EncoderPath = Annotated[str | None, typer.Option(help="where the encoder lies now, if it moved")]
EncoderDtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, auto")]
Dtype = Annotated[str, typer.Option(help="of the LSTM: float32, bfloat16, float16, auto")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …; auto: a GPU if there is one")]
Store = Annotated[Path | None, typer.Option(help="folder that keeps the prefix embeddings")]
Backend = Annotated[str, typer.Option(help="of the recurrence: auto, torch, reference")]


def _fail(message: str, code: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command; a user's mistake becomes one line and a non-zero exit."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        from fusion_model.errors import FusionLMError

        try:
            _quiet_transformers()
            function(*args, **kwargs)
        except FusionLMError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            _fail("interrupted; what was finished is kept", 130)
        except BrokenPipeError:
            raise
        except OSError as error:
            if error.errno is None:
                raise
            full = error.errno == errno.ENOSPC
            where = f": {error.filename}" if error.filename else ""
            _fail(f"{'the disk is full: make room' if full else error.strerror}{where}")

    return app.command()(wrapped)


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _device(name: str) -> str:
    import torch

    from fusion_model.errors import FusionLMError

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise FusionLMError(f"the device {name!r} cannot be used here: {reason}") from None
    return name


def _load(
    model: str, device: str, dtype: str, encoder: str | None, encoder_dtype: str, backend: str
) -> Any:
    import fusion_model

    return fusion_model.load(
        model,
        device=_device(device),
        dtype=dtype,
        encoder=encoder,
        encoder_dtype=encoder_dtype,
        backend=backend,
    )


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that appears only once it is whole."""
    if path is None:
        yield sys.stdout
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@command
def demo() -> None:
    """What the model does, on real sentences: surprisal, a continuation, perplexity, latency."""
    from fusion_model.demo import run_demo

    run_demo()


@command
def evaluate(
    model: Model,
    text: TextFiles,
    split: Split = "sentences",
    store: Store = None,
    encoder: EncoderPath = None,
    encoder_dtype: EncoderDtype = "float32",
    dtype: Dtype = "float32",
    device: Device = "auto",
    backend: Backend = "auto",
) -> None:
    """Perplexity of a text, in every unit that is in use."""
    from rich.console import Console
    from rich.table import Table

    from fusion_model.text import read_documents

    documents = read_documents(text, split)
    lm = _load(model, device, dtype, encoder, encoder_dtype, backend)
    with lm.open_store(store) as vectors:
        result = lm.perplexity(documents, vectors)
    table = Table("measure", "value", title=f"{model} on {', '.join(text)}")
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
    model: Model,
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
    encoder: EncoderPath = None,
    encoder_dtype: EncoderDtype = "float32",
    dtype: Dtype = "float32",
    device: Device = "auto",
    backend: Backend = "auto",
) -> None:
    """Surprisal of every word as TSV, in bits and nats."""
    from fusion_model.text import read_documents

    documents = read_documents(text, split)
    lm = _load(model, device, dtype, encoder, encoder_dtype, backend)
    with lm.open_store(store) as vectors:
        words = lm.score(
            documents,
            context=context,
            whitespace_correction=whitespace_correction,
            store=vectors,
        )
    with _output(out) as file:
        print("document\tsentence\tword\ttext\tbits\tnats\ttokens", file=file)
        for w in words:
            print(
                f"{w.document}\t{w.sentence}\t{w.word}\t{w.text}\t{w.bits:.6f}\t{w.nats:.6f}\t{w.tokens}",
                file=file,
            )


@command
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="text to go on from; may be empty")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: the likeliest token")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="sample from the k likeliest; 0: all")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    beam: Annotated[int, typer.Option(min=1, help="beam search of this width")] = 1,
    seed: Annotated[int | None, typer.Option(help="repeat a sample")] = None,
    encoder: EncoderPath = None,
    encoder_dtype: EncoderDtype = "float32",
    dtype: Dtype = "float32",
    device: Device = "auto",
    backend: Backend = "auto",
) -> None:
    """Continue a prompt; the text appears as it is made (beam search: at the end)."""
    from transformers import TextStreamer

    lm = _load(model, device, dtype, encoder, encoder_dtype, backend)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": beam}
    if beam == 1 and temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if beam == 1:
        options["streamer"] = TextStreamer(lm.tokenizer, skip_special_tokens=True)
    texts = lm.generate(prompt, seed=seed, **options)
    if beam > 1:
        print(texts[0])


@command
def embed(
    text: TextFiles,
    encoder: Annotated[str, typer.Option(help="minilm, a Hugging Face name or path")],
    out: Annotated[Path, typer.Option(help="folder of the store; an unfinished one is continued")],
    model: Annotated[
        str | None,
        typer.Option(help="embed for this trained model (default: for training on the text)"),
    ] = None,
    pooling: Annotated[str, typer.Option(help="as in train")] = "static+mean",
    view: Annotated[str, typer.Option(help="as in train")] = "prefix",
    split: Split = "sentences",
    detokenize: Annotated[bool, typer.Option(help="as in train")] = False,
    max_tokens: Annotated[int, typer.Option(help="as in train")] = 128,
    vocabulary: Annotated[str, typer.Option(help="as in train: bpe, encoder")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="as in train")] = 8192,
    encoder_dtype: EncoderDtype = "float32",
    store_dtype: Annotated[str | None, typer.Option(help="on disk: float16, float32")] = None,
    device: Device = "auto",
) -> None:
    """Fill a store with the embeddings of all prefixes of a text, for --store elsewhere."""
    from fusion_model.preparation import embed_text

    found = embed_text(
        text,
        encoder,
        out,
        model=model,
        pooling=pooling,
        view=view,
        split=split,
        detokenize=detokenize,
        max_tokens=max_tokens,
        vocabulary=vocabulary,
        vocab_size=vocab_size,
        encoder_dtype=encoder_dtype,
        store_dtype=store_dtype,
        device=_device(device),
    )
    print(f"{out}: {found.vectors:,} vectors for {found.positions:,} positions")


@command
def train(out: Path, store: Path | None, **options: Any) -> None:
    """Train a model; run the same command again to go on after an interruption."""
    from fusion_model.options import TrainingOptions
    from fusion_model.training import train as run

    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    best = run(TrainingOptions(**values), out, store)
    if os.environ.get("RANK", "0") == "0":
        print(f"{out}: dev perplexity {best['dev_perplexity']:.2f} in epoch {best['epoch']}")


def _give_training_options(function: Callable[..., None]) -> None:
    """Make `train`'s parameters out of the fields of `TrainingOptions`."""
    from fusion_model.options import TrainingOptions

    help_out = "folder for model, metrics, plot and model card"
    help_store = "folder for the prefix embeddings, may be shared by runs (default: OUT/prefixes)"
    parameters: dict[str, tuple[Any, Any]] = {
        "out": (Annotated[Path, typer.Option(help=help_out)], inspect.Parameter.empty),
        "store": (Annotated[Path | None, typer.Option(help=help_store)], None),
    }
    for field in dataclasses.fields(TrainingOptions):
        several = field.name in ("train_file", "dev_file")
        kind = list[str] if several else field.type
        default = inspect.Parameter.empty if several else field.default
        annotation = Annotated[kind, typer.Option(help=field.metadata["help"])]  # type: ignore[valid-type]
        parameters[field.name] = (annotation, default)
    keyword = inspect.Parameter.KEYWORD_ONLY
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, keyword, annotation=annotation, default=default)
            for name, (annotation, default) in parameters.items()
        ]
    )
    function.__annotations__ = {name: pair[0] for name, pair in parameters.items()}


_give_training_options(train)


def main() -> None:
    """Entry point of `fusion-lm`."""
    app()


if __name__ == "__main__":
    main()
