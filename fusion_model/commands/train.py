"""`train`, with the options of `TrainingOptions`, and `embed`, which fills a store for it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fusion_model.commands.app import Device, EncoderDtype, Split, TextFiles, command, installed
from fusion_model.encoders.policies import AUTO

AsInTrain = typer.Option(help="as in train")
AtLeast1 = typer.Option(min=1, help="as in train")
STORE_HELP = "folder for the prefix embeddings, may be shared by runs (default: OUT/prefixes)"


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Which vectors, as `embed_text` calls it."""

    model: Annotated[
        str | None,
        typer.Option(help="embed for this trained model (default: for training on the text)"),
    ] = None
    pooling: Annotated[str, AsInTrain] = AUTO
    view: Annotated[str, AsInTrain] = "prefix"
    policy: Annotated[str, AsInTrain] = AUTO
    split: Split = "sentences"
    detokenize: Annotated[bool, AsInTrain] = False
    max_tokens: Annotated[int, AtLeast1] = 128
    vocabulary: Annotated[str, typer.Option(help="as in train: bpe, encoder")] = "bpe"
    vocab_size: Annotated[int, AtLeast1] = 8192
    encoder_dtype: EncoderDtype = "float32"
    store_dtype: Annotated[str | None, typer.Option(help="on disk: float16, float32")] = None
    device: Device = "auto"
    encoder_batch: Annotated[
        int | None, typer.Option(min=1, help="most encoder tokens at once (default: by device)")
    ] = None


@command
def embed(
    text: TextFiles,
    encoder: Annotated[str, typer.Option(help="minilm, a Hugging Face name or path")],
    out: Annotated[Path, typer.Option(help="folder of the store; an unfinished one is continued")],
    vectors: Embedding,
) -> None:
    """Fill a store with the embeddings of all prefixes of a text, for --store elsewhere."""
    from fusion_model.devices import resolve_device
    from fusion_model.training.data import embed_text

    device = resolve_device(vectors.device)
    found = embed_text(text, encoder, out, **vars(vectors) | {"device": device})
    if found is not None:
        print("{}: {:,} vectors for {:,} positions".format(out, *found))


if installed("torch"):  # without it, only what runs an exported model is offered
    from fusion_model.training.options import TrainingOptions

    @command
    def train(
        out: Annotated[Path, typer.Option(help="folder for model, metrics, plot and model card")],
        options: TrainingOptions,
        store: Annotated[Path | None, typer.Option(help=STORE_HELP)] = None,
    ) -> None:
        """Train a model; run the same command again to go on after an interruption."""
        from fusion_model.training.run import train as run

        best = run(options, out, store)
        if os.environ.get("RANK", "0") == "0":
            print(f"{out}: dev perplexity {best['dev_perplexity']:.2f} in epoch {best['epoch']}")
