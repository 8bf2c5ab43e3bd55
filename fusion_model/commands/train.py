"""`train`, with the options of `TrainingOptions`, and `embed`, which fills a store for it."""

import dataclasses
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_model.commands.app import Device, EncoderDtype, Split, TextFiles, command
from fusion_model.devices import resolve_device
from fusion_model.training.options import TrainingOptions


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
    policy: Annotated[str, typer.Option(help="as in train")] = "every",
    split: Split = "sentences",
    detokenize: Annotated[bool, typer.Option(help="as in train")] = False,
    max_tokens: Annotated[int, typer.Option(help="as in train")] = 128,
    vocabulary: Annotated[str, typer.Option(help="as in train: bpe, encoder")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="as in train")] = 8192,
    encoder_dtype: EncoderDtype = "float32",
    store_dtype: Annotated[str | None, typer.Option(help="on disk: float16, float32")] = None,
    device: Device = "auto",
    encoder_batch: Annotated[
        int | None, typer.Option(help="most encoder tokens at once (default: by device)")
    ] = None,
) -> None:
    """Fill a store with the embeddings of all prefixes of a text, for --store elsewhere."""
    from fusion_model.training.data import embed_text

    found = embed_text(
        text,
        encoder,
        out,
        model=model,
        pooling=pooling,
        view=view,
        policy=policy,
        split=split,
        detokenize=detokenize,
        max_tokens=max_tokens,
        vocabulary=vocabulary,
        vocab_size=vocab_size,
        encoder_dtype=encoder_dtype,
        store_dtype=store_dtype,
        device=resolve_device(device),
        encoder_batch=encoder_batch,
    )
    if found is not None:
        print(f"{out}: {found.vectors:,} vectors for {found.positions:,} positions")


def give_training_options(function: Callable[..., None]) -> None:
    """Make the function's parameters out of the fields of `TrainingOptions`."""
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


def train(out: Path, store: Path | None, **options: Any) -> None:
    """Train a model; run the same command again to go on after an interruption."""
    from fusion_model.training.run import train as run

    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    best = run(TrainingOptions(**values), out, store)
    if os.environ.get("RANK", "0") == "0":
        print(f"{out}: dev perplexity {best['dev_perplexity']:.2f} in epoch {best['epoch']}")


give_training_options(train)
command(train)
