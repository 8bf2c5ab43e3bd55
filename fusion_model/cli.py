"""The command line. Each command imports what it needs, so that `--help` answers at once."""

import errno
import functools
import importlib.util
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

MODEL_HELP = "folder, hub name, or fusion-lm-small, which ships"
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
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
ModelOrNone = Annotated[str | None, typer.Argument(help=MODEL_HELP)]
Onnx = Annotated[
    Path | None,
    typer.Option(help="instead of a model: folder that fusion-lm export wrote; needs no PyTorch"),
]
Threads = Annotated[int | None, typer.Option(min=1, help="with --onnx (default: all cores)")]
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
        except ModuleNotFoundError as error:
            extras = {"torch": "", "transformers": "", "onnx": "[onnx]", "onnxscript": "[onnx]"}
            if error.name not in extras:
                raise
            package = f'-e ".{extras[error.name]}" -c constraints.txt, in the repository'
            _fail(f"this needs {error.name}, which is not installed: pip install {package}")
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


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _quiet_transformers() -> None:
    if not _installed("transformers"):
        return  # an exported model runs without
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


def _open(
    model: str | None,
    onnx: Path | None,
    threads: int | None,
    device: str,
    dtype: str,
    encoder: str | None,
    encoder_dtype: str,
    backend: str,
) -> Any:
    """A model, or an exported one; of the latter, what was settled at export cannot be chosen."""
    from fusion_model.errors import FusionLMError

    if onnx is None and model is not None:
        if threads is not None:
            raise FusionLMError("--threads goes with --onnx; PyTorch takes OMP_NUM_THREADS")
        return _load(model, device, dtype, encoder, encoder_dtype, backend)
    if onnx is None or model is not None:
        raise FusionLMError("name a model, or an exported one with --onnx: one of the two")
    for option, value, default in (
        ("--dtype", dtype, "float32"),
        ("--encoder", encoder, None),
        ("--encoder-dtype", encoder_dtype, "float32"),
        ("--backend", backend, "auto"),
    ):
        if value != default:
            raise FusionLMError(f"{option} does not go with --onnx: it was settled at export")
    from fusion_model.export import OnnxFusionLM

    return OnnxFusionLM(onnx, device=device, threads=threads)


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
    from fusion_model.demo import MODEL, run_demo

    run_demo()
    if _installed("onnxruntime") and _installed("onnx"):
        from fusion_model.export.demo import show_export

        show_export(MODEL)
    print(f"\nNext: fusion-lm score {MODEL} --text YOUR.txt, or fusion-lm train --help")


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
    text: TextFiles,
    model: ModelOrNone = None,
    onnx: Onnx = None,
    threads: Threads = None,
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
    from fusion_model.errors import FusionLMError
    from fusion_model.text import read_documents

    documents = read_documents(text, split)
    lm = _open(model, onnx, threads, device, dtype, encoder, encoder_dtype, backend)
    options: dict[str, Any] = {"context": context, "whitespace_correction": whitespace_correction}
    if onnx is None:
        with lm.open_store(store) as vectors:
            words = lm.score(documents, store=vectors, **options)
    elif store is not None:
        raise FusionLMError("--store does not go with --onnx: its embeddings are kept in memory")
    else:
        words = lm.score(documents, **options)
    with _output(out) as file:
        print("document\tsentence\tword\ttext\tbits\tnats\ttokens", file=file)
        for w in words:
            print(
                f"{w.document}\t{w.sentence}\t{w.word}\t{w.text}\t{w.bits:.6f}\t{w.nats:.6f}\t{w.tokens}",
                file=file,
            )


@command
def generate(
    model: ModelOrNone = None,
    onnx: Onnx = None,
    threads: Threads = None,
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
    lm = _open(model, onnx, threads, device, dtype, encoder, encoder_dtype, backend)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": beam}
    if beam == 1 and temperature > 0:
        options |= {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if beam == 1 and onnx is None:
        from transformers import TextStreamer

        options["streamer"] = TextStreamer(lm.tokenizer, skip_special_tokens=True)
    elif beam == 1:
        from fusion_model.export.streaming import TokenPrinter

        options["streamer"] = TokenPrinter(lm.tokenizer)
    texts = lm.generate(prompt, seed=seed, **options)
    if beam > 1:
        print(texts[0])


@command
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="folder to write; an earlier export is replaced")],
    with_encoder: Annotated[
        bool, typer.Option("--encoder", help="the prefixes' encoder, too: text to surprisal")
    ] = False,
    encoder_path: EncoderPath = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16 (GPU), int8 (CPU)")] = "fp32",
    opset: Annotated[int, typer.Option(help="20 or 21")] = 20,
) -> None:
    """Write a model as ONNX, verified against PyTorch, for use without it."""
    from fusion_model.export.exporter import export_model, report

    manifest = export_model(
        model,
        out,
        encoder=with_encoder,
        encoder_path=encoder_path,
        precision=precision,
        opset=opset,
    )
    for line in report(manifest):
        print(line)
    print(f"{out}: {precision}, ONNX opset {opset}")


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


def train(out: Path, store: Path | None, **options: Any) -> None:
    """Train a model; run the same command again to go on after an interruption."""
    from fusion_model.options import TrainingOptions
    from fusion_model.training import train as run

    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    best = run(TrainingOptions(**values), out, store)
    if os.environ.get("RANK", "0") == "0":
        print(f"{out}: dev perplexity {best['dev_perplexity']:.2f} in epoch {best['epoch']}")


if _installed("torch"):  # without it, only what runs an exported model is offered
    from fusion_model.training_parameters import give_training_options

    give_training_options(train)
    command(train)


def main() -> None:
    """Entry point of `fusion-lm`."""
    app()


if __name__ == "__main__":
    main()
