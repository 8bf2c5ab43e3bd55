"""Commands about the Triton kernels: what they compile to, and whether a GPU runs them right."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_model.commands.app import command, installed


def _table(reports: list[Any]) -> Any:
    from rich.table import Table

    table = Table(title="Triton kernels, compiled ahead of time")
    table.add_column("kernel", no_wrap=True)
    for name in ("sm", "regs", "stack B", "shared B", "tensor", "loop", "LDL", "publish"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for r in reports:
        figures = [r.chip, r.registers, r.stack, r.shared, r.tensor_core]
        figures += [r.loop, r.local_loads, r.publishes] if r.loop else ["-"] * 3
        table.add_row(r.name, *map(str, figures), "; ".join(r.problems) or "ok")
    return table


@command
def kernels(
    arch: Annotated[list[int] | None, typer.Option(help="80, 90, 100; repeatable")] = None,
    match: Annotated[str, typer.Option(help="only kernels whose name holds this")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="figures as JSON")] = False,
    jobs: Annotated[int, typer.Option(min=0, help="compilations at a time; 0: one a core")] = 0,
    quick: Annotated[bool, typer.Option(help="sm_90, and one shape of each kernel")] = False,
) -> None:
    """Compile every Triton kernel for sm_80, sm_90 and sm_100, and judge the result; no GPU needed.

    Fails where registers spill, shared memory or registers do not fit, tensor cores are not used,
    or a chained launch does not wait first; and, of kernels whose programs wait for each other,
    where the time loop reads local memory, a step waits for its loads more than once, or the wait
    is by a fence or an atomic. Triton keeps on disk what it compiled.
    """
    from fusion_model.errors import FusionLMError

    if not installed("triton"):
        raise FusionLMError("this needs triton: pip install triton (Linux on x86-64)")
    from fusion_model.kernels.triton.configs import KNOWN_CHIPS, interpreting

    if interpreting():
        raise FusionLMError(
            "TRITON_INTERPRET is set, and an interpreter compiles nothing: unset it"
        )
    chips = arch or ([90] if quick else list(KNOWN_CHIPS))
    if unknown := [chip for chip in chips if chip not in KNOWN_CHIPS]:
        raise FusionLMError(
            f"no such chip, {unknown[0]}: choose of {', '.join(map(str, KNOWN_CHIPS))}"
        )
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what each kernel asks for, too
    from fusion_model import progress
    from fusion_model.kernels.check.compiled import gate
    from fusion_model.kernels.check.variants import variants

    work = [(v, chip) for chip in chips for v in variants(chip) if match in v.name]
    if quick:
        work = list({(v.home, chip): (v, chip) for v, chip in reversed(work)}.values())
    if not work:
        raise FusionLMError(f"no kernel has {match!r} in its name")
    with progress.track("kernels", len(work)) as update:
        reports = gate(work, jobs or os.cpu_count() or 1, update)
    failed = sum(bool(r.problems) for r in reports)
    if as_json:
        print(json.dumps([asdict(r) for r in reports], indent=1))
    else:
        from rich.console import Console

        console = Console(width=None if os.isatty(1) else 160)
        console.print(_table(reports))
        print(f"{len(reports) - failed} of {len(reports)} as they should be")
    if failed:
        raise typer.Exit(1)


@command
def gpu_check(
    out: Annotated[Path, typer.Option(help="folder for results.json and report.md")],
    part: Annotated[list[str] | None, typer.Option(help="only this part; repeatable")] = None,
    jobs: Annotated[int, typer.Option(min=0, help="checks at a time; 0: one a core")] = 0,
) -> None:
    """Check and time every Triton kernel on the GPU of this machine, in under 8 minutes.

    Each part runs in a process of its own: a case that fails or hangs stops no other, and what is
    known is written at once. Exits with 1 where something failed; a goal that is not met is told.
    """
    import torch

    from fusion_model.errors import FusionLMError

    if not torch.cuda.is_available():
        raise FusionLMError("gpu-check needs a CUDA device, and PyTorch finds none here")
    if not installed("triton"):
        raise FusionLMError("this needs triton: pip install triton (Linux on x86-64)")
    from fusion_model.benchmarks.gpu.parts import PARTS, judge
    from fusion_model.benchmarks.measure.machine import describe
    from fusion_model.kernels.check.gpu import run_parts
    from fusion_model.kernels.check.report import report

    if unknown := set(part or ()) - set(PARTS):
        raise FusionLMError(f"no such part, {unknown.pop()}: choose of {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    chosen = {name: PARTS[name] for name in part or PARTS}
    results = run_parts(
        chosen,
        out,
        lambda line: print(line, flush=True),
        jobs,
        machine=describe("cuda"),
        judge=judge,
    )
    print(report(results))
    print(f"{out / 'results.json'}: {results['failed']} failed")
    if results["failed"]:
        raise typer.Exit(1)
