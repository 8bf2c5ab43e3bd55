"""The compile gate: what it sees in compiled code, and that it fails on what is wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton")

from fusion_model.kernels.check.compiled import Compiled, examine, instructions, judge
from fusion_model.kernels.check.variants import Variant
from fusion_model.kernels.triton.configs import KNOWN_CHIPS

from fusion_model.cli import app

COMPILING = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
COMPILING |= {"TRITON_DEFAULT_FP_FUSION": "1"}


def run(*options: str) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "fusion_model.cli", "kernels", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=COMPILING)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_kernels_of_the_published_size() -> None:
    """On all chips; the rest of what ships is compiled by the slow test, and by the command."""
    for shape, kernels in [
        ("timed tokens bf16 B16 H768", ["forward"]),
        ("sequence bf16 B16 T37 D512 H768", ["forward", "backward"]),
    ]:
        code, reports = run("--match", f"{shape} sequence")
        assert {(r["name"], r["chip"]) for r in reports} == {
            (f"{shape} sequence_{kernel}_kernel", chip)
            for kernel in kernels
            for chip in KNOWN_CHIPS
        }
        for r in reports:
            assert not r["problems"]
            assert min(r["registers"], r["tensor_core"], r["loop"], r["publishes"]) > 0
        assert code == 0


@pytest.mark.slow
@pytest.mark.parametrize("chip", KNOWN_CHIPS)
def test_every_shipped_kernel(chip: int) -> None:
    code, reports = run("--arch", str(chip))
    assert len(reports) > (200 if chip == 90 else 120)
    assert [(r["name"], r["problems"]) for r in reports if r["problems"]] == []
    assert code == 0


REGRESSION = """
from dataclasses import replace
from fusion_model.cli import app
from fusion_model.kernels.check import compiled
from fusion_model.kernels.check.variants import variants
from typer.testing import CliRunner
found = {chip: variants(chip) for chip in (80, 90)}
[whole] = [v for v in found[90] if v.name == "timed tokens bf16 B16 H768 sequence_forward_kernel"]
crowded = replace(whole, options={**whole.options, "num_warps": 1})
wrong = replace(whole, constants={**whole.constants, "CHUNK": 5})
for variant in (crowded, wrong):
    print("; ".join(compiled.examine(variant, 90).problems))
for chip, each in found.items():
    assert all(p.do_not_specialize for v in each for p in v.kernel().params
               if v.signature.get(p.name) == "i32"), "as if numbers were specialised on"
    assert all(v.spins == ("sequence" in v.home) for v in each)
    homes = {v.home.rpartition(".")[2] for v in each}
    print(len(homes), sum(v.constants.get("WIDTH") == 1504 for v in each) > 5)
compiled.gate = lambda work, *_: print(len(work), {c for _, c in work}, len(homes)) or []
for options in (["--quick"], ["--arch", "90", "--match", "cosine"]):
    print(CliRunner().invoke(app, ["kernels", *options]).output.splitlines()[0])
"""


def test_what_is_compiled() -> None:
    """The weights in the registers of one warp spill; a chunk of 5 does not compile."""
    command = [sys.executable, "-c", REGRESSION]
    out = subprocess.run(command, capture_output=True, text=True, env=COMPILING, check=True).stdout
    crowded, wrong, on_80, on_90, quick, none = out.splitlines()
    assert "registers spill" in crowded
    assert "Error" in wrong
    assert on_80 == on_90 == "8 True"
    assert quick == "8 {90} 8"
    assert none == "error: no kernel has 'cosine' in its name"


TIMED = """
import torch
from fusion_model.benchmarks.gpu import timing
from fusion_model.kernels.check import variants

timing.DEVICE, timing.flatten = "meta", lambda weights: None

def launches():
    for part in (timing.sequences, timing.tokens, timing.prefixes, timing.surprisals):
        for name, run in part(torch.device("meta"), *[3] * (part is timing.sequences)):
            if name.endswith("eager"):
                yield name
                with torch.device("cpu"):  # where lengths of packed rows must be
                    run.args[0]()[0]()

def known(found):
    return {repr((v.home, v.signature, v.constants, v.options)) for v in found}

timed = known(variants.recorded(90, launches()))
print(len(timed), timed - known(variants.variants(90)))
"""


def test_what_is_timed_is_compiled() -> None:
    command = [sys.executable, "-c", TIMED]
    out = subprocess.run(command, capture_output=True, text=True, env=COMPILING, check=True).stdout
    count, missing = out.split(maxsplit=1)
    assert int(count) > 30
    assert missing == "set()\n"


def test_what_the_command_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def output(*options: str) -> str:
        result = CliRunner().invoke(app, ["kernels", *options])
        assert result.exit_code == 1
        return result.output

    assert "TRITON_INTERPRET is set" in output()
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert output("--arch", "70") == "error: no such chip, 70: choose of 80, 90, 100\n"


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("MEMBAR.ALL.GPU", "fences or atomics in the loop: MEMBAR.ALL.GPU"),
        ("MEMBAR.SC.SYS", "fences or atomics in the loop: MEMBAR.SC.SYS"),
        ("REDG.E.ADD.STRONG.GPU", "fences or atomics in the loop: REDG.E.ADD.STRONG.GPU"),
        ("ATOMG.E.EXCH.STRONG.GPU", "fences or atomics in the loop: ATOMG.E.EXCH.STRONG.GPU"),
        ("MEMBAR.ALL.CTA", None),
        ("REDUX.MAX", None),
    ],
)
def test_programs_tell_by_strong_stores_alone(code: str, problem: str | None) -> None:
    options = {"num_warps": 4, "launch_cooperative_grid": True}
    waiting = Variant("x", "", {}, {}, options)
    weak = SASS.replace("LDL", code)
    strong = weak.replace("STG.E", "STG.E.STRONG.GPU")
    found = judge(waiting, 90, Compiled(PTX, USAGE, sass=strong))
    assert found.problems == ([problem] if problem else [])
    assert found.publishes == 1
    problems = judge(waiting, 90, Compiled(PTX, USAGE, sass=weak)).problems
    assert "no strong store in the time loop" in problems


USAGE = "REG:100 STACK:0"
PTX = """
.global .align 1 .b8 _$_str[11];
    griddepcontrol.wait; // dummy %r23
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1, %r2}, {%r3, %r4}, {%r5}, {%r6};
"""
SASS = """
.L_x_0:
        /*0000*/                   LDG.E R1, [R2] ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32 R4, R5, R6, R7 ;
        /*0020*/              @P0  BRA `(.L_x_1) ;
        /*0030*/                   LDL R1, [R1] ;
        /*0040*/                   STG.E [R2], R1 ;
        /*0050*/             @!P1  BRA `(.L_x_0) ;
        /*0060*/                   EXIT ;
"""


def test_the_longest_loop_is_found() -> None:
    codes, (start, end) = instructions(SASS)
    assert codes[start:end] == ["LDG.E", "HMMA.16816.F32", "BRA", "LDL", "STG.E", "BRA"]
    assert codes[-1] == "EXIT"


def test_every_limit_is_judged() -> None:
    good = Variant("x", "", {}, {"PRECISION": "tf32", "CHAINED": True}, {"num_warps": 4})
    waiting = replace(good, options={**good.options, "launch_cooperative_grid": True})
    strong = SASS.replace("LDL", "LDS").replace("STG.E", "STG.E.STRONG.GPU")
    clean = Compiled(PTX, USAGE, 1000, strong)
    for variant in (good, waiting):
        found = judge(variant, 90, clean)
        assert (found.problems, found.tensor_core) == ([], 1)
    late, first = strong.replace("LDS", "LDG.E.STRONG.SYS"), PTX.splitlines()
    moved = "\n".join([*first[:2], first[3], first[2], *first[4:]])  # a load, then the wait
    for variant, changes, problem in [
        (good, {"usage": "REG:100 STACK:24"}, "24 B of stack"),
        (good, {"shared": 232_449}, "232449 B of shared memory"),
        (replace(good, options={"num_warps": 32}), {}, "100 registers x 1024"),
        (good, {"ptx": PTX.replace("mma.sync", "fma.rn")}, "no tensor-core"),
        (good, {"sass": strong.replace("LDS", "LDL")}, "1 local loads"),
        (waiting, {"sass": late}, "do not all come before"),
        (waiting, {"sass": strong.replace("STRONG.GPU", "")}, "no strong store"),
        (good, {"usage": ""}, "no resource usage"),
        (good, {"ptx": PTX.replace("griddepcontrol.wait", "")}, "a chained launch does not wait"),
        (good, {"ptx": moved}, "a chained launch does not wait"),
    ]:
        [found] = judge(variant, 90, replace(clean, **changes)).problems
        assert problem in found


def test_what_does_not_compile_is_a_problem() -> None:
    missing = Variant(
        "x", "fusion_model.kernels.triton.primitives:nothing", {}, {}, {"num_warps": 4}
    )
    assert "AttributeError" in examine(missing, 90).problems[0]
