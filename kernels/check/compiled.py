"""Every shipped kernel configuration, compiled ahead of time for chips not here, and judged.

What ptxas says decides: registers, spills, shared memory; and what it was given: tensor-core
instructions, and that a chained launch waits before it touches memory. Where programs wait for
each other, or something is on the stack, the disassembler is asked, which takes 0.4 s: for local
loads in the time loop, that a step's loads come before its products, and that programs tell each
other by strong stores alone, without a fence or an atomic. The same limits hold for every triton
version.
"""

import multiprocessing
import re
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from fusion_model.kernels.check.variants import Variant
from fusion_model.kernels.triton.configs import KNOWN_CHIPS

STACK = 16  # bytes a thread may keep on the stack
REGISTERS = 65_536  # of a multiprocessor
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA")
PRODUCT = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")  # in PTX
GLOBAL = re.compile(r"\b(?:ld|st|cp|atom|red)\.[\w.:]*global")  # memory that launches share


@dataclass
class Report:
    """What one configuration compiled to for one chip; `problems` is empty where all is well."""

    name: str
    chip: int
    registers: int = 0
    stack: int = 0
    shared: int = 0
    tensor_core: int = 0
    loop: int = 0
    local_loads: int = 0
    publishes: int = 0
    problems: list[str] = field(default_factory=list)


def _tool(name: str, path: str, *options: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *options, path], capture_output=True, text=True, check=True).stdout


@dataclass
class Compiled:
    """Of a configuration: PTX, resource usage, bytes of shared memory, and where asked SASS."""

    ptx: str
    usage: str
    shared: int = 0
    sass: str = ""

    def used(self, what: str) -> int:
        """Of each thread: REG, registers; STACK, bytes."""
        found = re.search(rf"{what}:(\d+)", self.usage)
        return int(found[1]) if found else 0


def compile_variant(variant: Variant, chip: int) -> Compiled:
    """A configuration as Triton compiles it for a chip that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = variant.kernel()
    names = kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(k),): v for k, v in variant.constants.items()}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", chip, 32), options=dict(variant.options)
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", file.name, "--dump-resource-usage")
        found = Compiled(compiled.asm["ptx"], usage, compiled.metadata.shared)
        if variant.spins or found.used("STACK"):
            found.sass = _tool("nvdisasm", file.name, "-c", "-ndf")  # no dataflow: 3/4 of the time
    return found


def instructions(sass: str) -> tuple[list[str], tuple[int, int]]:
    """Opcodes in order, and the range of the longest loop among them (empty: (0, 0))."""
    found: list[str] = []
    labels: dict[str, int] = {}
    loop = (0, 0)
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", line):
            found.append(code[1])
            target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
            if target and target[1] in labels:
                start = labels[target[1]]
                if len(found) - start > loop[1] - loop[0]:
                    loop = (start, len(found))
    return found, loop


def judge(variant: Variant, chip: int, compiled: Compiled) -> Report:
    """The figures of a compiled configuration, and what is wrong with them."""
    codes, (start, end) = instructions(compiled.sass)
    in_loop = codes[start:end]
    # A MEMBAR within the block is wgmma's; REDUX is a reduction within a warp.
    waits = [c for c in in_loop if re.match(r"MEMBAR(?!.*\.CTA)|REDG?\.|ATOM", c)]
    report = Report(
        variant.name,
        chip,
        registers=compiled.used("REG"),
        stack=compiled.used("STACK"),
        shared=compiled.shared,
        tensor_core=len(PRODUCT.findall(compiled.ptx)),
        loop=len(in_loop),
        local_loads=sum(code.startswith("LDL") for code in in_loop),
        publishes=sum(bool(re.match(r"STG?\..*STRONG\.GPU", code)) for code in in_loop),
    )
    threads = 32 * int(variant.options["num_warps"])
    product = next((i for i, c in enumerate(in_loop) if c.startswith(TENSOR_CORES)), len(in_loop))
    late = any("STRONG.SYS" in code for code in in_loop[product:])  # loads of what others wrote
    reached = GLOBAL.search(compiled.ptx)
    waited = "griddepcontrol.wait" in compiled.ptx[: reached.start() if reached else None]
    one_trip = variant.constants.get("PHASE") == variant.constants.get("CHUNKS")
    room = KNOWN_CHIPS[chip].shared
    checks = [
        (report.registers > 0, "no resource usage was found in the cubin"),
        (report.stack <= STACK, f"{report.stack} B of stack: registers spill"),
        (report.shared <= room, f"{report.shared} B of shared memory, {room} fit"),
        (report.registers * threads <= REGISTERS, f"{report.registers} registers x {threads}"),
        (report.tensor_core > 0 or not variant.products, "no tensor-core instruction"),
        (not report.local_loads, f"{report.local_loads} local loads in the loop"),
        (not (late and one_trip), "a step's loads do not all come before its products"),
        (waited or not variant.constants.get("CHAINED"), "a chained launch does not wait first"),
        (not (waits and variant.spins), f"fences or atomics in the loop: {' '.join(waits)}"),
        (not variant.spins or report.publishes > 0, "no strong store in the time loop"),
    ]
    report.problems = [what for good, what in checks if not good]
    return report


def examine(variant: Variant, chip: int) -> Report:
    """Compile and judge; a configuration that does not compile is a problem, not an exception."""
    try:
        return judge(variant, chip, compile_variant(variant, chip))
    except Exception as error:
        last = (str(error) or traceback.format_exc()).strip().splitlines()[-1]
        return Report(variant.name, chip, problems=[f"{type(error).__name__}: {last[:200]}"])


def gate(
    work: list[tuple[Variant, int]], jobs: int, done: Callable[[int], None] = lambda _: None
) -> list[Report]:
    """Reports in the order of `work`, by `jobs` processes; `done` hears how many are finished."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) if jobs > 1 else nullcontext() as pool:
        reports = []
        for report in (pool.map if pool else map)(examine, *zip(*work, strict=True)):
            reports.append(report)
            done(len(reports))
    return reports
