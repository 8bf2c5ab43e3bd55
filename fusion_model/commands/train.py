"""`train` and `embed`, which fills a store for it; their options are dataclasses."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fusion_model.commands.app import command, installed

STORE_HELP = "folder for the prefix embeddings, may be shared by runs (default: OUT/prefixes)"

if installed("torch"):  # without it, only what runs an exported model is offered
    from fusion_model.training.options import EmbedOptions, TrainingOptions

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

    @command
    def embed(
        out: Annotated[
            Path, typer.Option(help="folder of the store; an unfinished one is continued")
        ],
        options: EmbedOptions,
    ) -> None:
        """Fill a store with the embeddings of all prefixes of a text, for --store elsewhere."""
        from fusion_model.training.data import embed_text

        found = embed_text(options, out)
        if found is not None:
            print("{}: {:,} vectors for {:,} positions".format(out, *found))
