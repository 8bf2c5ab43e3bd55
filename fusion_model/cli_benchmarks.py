"""`fusion-lm bench` and `fusion-lm profile`: how fast, on this machine and on your text."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fusion_model.command_line import (
    MODEL_HELP,
    Device,
    command,
    resolve_device,
)

Size = Annotated[int | None, typer.Option(min=1)]


@command
def bench(
    model: Annotated[
        str | None, typer.Argument(help=f"measure this model's own sizes: {MODEL_HELP}")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="minutes: fewer shapes, samples")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="an operation or a backend; repeatable")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="your text, for the cases on text; repeatable")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="HTML page to write")] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="folder to append to (default, in a clone: benchmarks/results)"),
    ] = None,
    hidden_size: Size = None,
    batch: Size = None,
    length: Annotated[int | None, typer.Option(min=1, help="tokens a sequence")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16")] = None,
    backend: Annotated[str | None, typer.Option(help="this one, beside plain PyTorch")] = None,
    device: Device = "auto",
) -> None:
    """Measure this machine: each operation, each backend, against plain PyTorch."""
    from rich.console import Console

    from fusion_model.benchmarks import results as kept
    from fusion_model.benchmarks.bench import bench as run
    from fusion_model.benchmarks.bench import chosen_cases, glossary, remarks, tables
    from fusion_model.benchmarks.machine import where
    from fusion_model.benchmarks.report import write_report
    from fusion_model.errors import FusionLMError

    own = {"hidden_size": hidden_size, "batch": batch, "length": length, "dtype": dtype}
    shape = {name: value for name, value in own.items() if value is not None}
    suite = "quick" if quick else "full"
    chosen = chosen_cases(suite, only or [], shape, backend, model)
    outcome = run(
        chosen,
        suite,
        model or "fusion-lm-small",
        text or [],
        resolve_device(device),
        results or kept.home(),
        "fusion-lm " + " ".join(sys.argv[1:]),
    )
    console = Console()
    for shown in tables(outcome.records):
        console.print(shown, "")
    for line in remarks(outcome.records):
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    for name, meaning in glossary(outcome.records).items():
        console.print(f"{name}: {meaning}", style="dim", highlight=False, soft_wrap=True)
    print(where(outcome.run["machine"]))
    if outcome.kept:
        print(f"appended to {outcome.kept}")
    if report:
        write_report(report, outcome.run, outcome.records)
        print(f"report: {report}")
    if any(r["kind"] == "wrong" for r in outcome.records):
        raise FusionLMError("a backend gave wrong results, see above")
