"""`fusion-lm bench` and `fusion-lm profile`: how fast, on this machine and on your text."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fusion_model.commands.app import (
    MODEL_HELP,
    AnyModel,
    Device,
    TextFiles,
    check_outputs,
    command,
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
        typer.Option(help="folder to append to (default, in a clone: out/bench)"),
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

    from fusion_model.benchmarks.measure import records as kept
    from fusion_model.benchmarks.measure.machine import where
    from fusion_model.benchmarks.page.page import page
    from fusion_model.benchmarks.suite.bench import bench as run
    from fusion_model.benchmarks.suite.bench import chosen_cases, glossary, remarks, tables
    from fusion_model.devices import resolve_device
    from fusion_model.errors import FusionLMError
    from fusion_model.files import write_text

    check_outputs(report, texts=text or [])
    own = {"hidden_size": hidden_size, "batch": batch, "length": length, "dtype": dtype}
    shape = {name: value for name, value in own.items() if value is not None}
    suite = "quick" if quick else "full"
    chosen = chosen_cases(suite, only or [], shape, backend, model)
    keep = results or kept.home()
    first, records = run(
        chosen,
        suite,
        model or "fusion-lm-small",
        text or [],
        resolve_device(device),
        keep,
        shlex.join(["fusion-lm", *sys.argv[1:]]),
    )
    console = Console()
    for shown in tables(records):
        console.print(shown, "")
    for line in remarks(records):
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    for name, meaning in glossary(records).items():
        console.print(f"{name}: {meaning}", style="dim", highlight=False, soft_wrap=True)
    print(where(first["machine"]))
    if keep:
        print(f"appended to {kept.file_of(keep, first)}")
    if report:
        write_text(report, page(first, records))
        print(f"report: {report}")
    if any(r["kind"] == "wrong" for r in records):
        raise FusionLMError("a backend failed, or gave wrong results: see above")


@command
def profile(
    *,
    text: TextFiles,
    tokens: Annotated[int, typer.Option(min=3, help="made after each prompt")] = 48,
    runs: Annotated[int, typer.Option(min=1, help="prompts, from the text")] = 12,
    batch: Annotated[int, typer.Option(min=1, help="rows at a time")] = 1,
    prompt_words: Annotated[int, typer.Option(min=1)] = 8,
    json: Annotated[Path | None, typer.Option(help="all figures, for machines")] = None,
    trace: Annotated[
        Path | None, typer.Option(help="for ui.perfetto.dev, chrome://tracing")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="latency by position: .svg, .png, .pdf")] = None,
    policy: Annotated[
        str | None, typer.Option(help="encoding policy (default: the model's own)")
    ] = None,
    chosen: AnyModel,
) -> None:
    """Latency token by token, of generating and scoring: how long, and spent on what."""
    from rich.console import Console

    from fusion_model.benchmarks.profile import report as latency_report
    from fusion_model.benchmarks.profile.latency import trace as to_trace
    from fusion_model.benchmarks.profile.profile import profile_model

    latency_report.check_plot(plot)
    check_outputs(json, trace, plot, texts=text)
    lm = chosen.open(policy)
    engine = "torch" if chosen.onnx is None else "onnx"
    settings = {"runs": runs, "tokens": tokens, "batch": batch, "prompt_words": prompt_words}
    found, passes = profile_model(lm, str(chosen.model or chosen.onnx), engine, text, settings)
    console = Console()
    console.print(found["title"], style="bold", highlight=False, soft_wrap=True)
    for shown in latency_report.tables(found):
        console.print(shown, "")
    for line in latency_report.lines(found):
        console.print(line, highlight=False, soft_wrap=True)
    if json:
        latency_report.write_json(json, found)
    if trace:
        latency_report.write_json(trace, to_trace(passes), indent=None)
    if plot:
        latency_report.plot(found, plot)
    for path in (json, trace, plot):
        if path:
            print(f"wrote {path}")
