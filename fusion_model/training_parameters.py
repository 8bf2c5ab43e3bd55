"""The command `train` takes what `TrainingOptions` has; the two cannot drift apart."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_model.options import TrainingOptions


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
