"""`export`: a model as ONNX."""

from pathlib import Path
from typing import Annotated

import typer

from fusion_model.commands.app import (
    EncoderPath,
    Model,
    command,
)


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
    from fusion_model.errors import FusionLMError
    from fusion_model.export.exporter import export_model, report

    if encoder_path is not None and not with_encoder and precision != "int8":
        raise FusionLMError("--encoder-path goes with --encoder: else no encoder is read")
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
