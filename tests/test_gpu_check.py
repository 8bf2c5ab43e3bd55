"""`fusion-lm gpu-check` itself: nothing stops it, what is known is written, goals are judged."""

import json
import sys
import time
from io import StringIO
from pathlib import Path
from typing import Any

import gpu_fake_parts
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from fusion_model.benchmarks.gpu import timing
from fusion_model.benchmarks.gpu.goals import GOALS, of_auto, verdicts
from fusion_model.benchmarks.gpu.parts import PARTS
from fusion_model.benchmarks.measure import machine
from fusion_model.kernels import backend
from fusion_model.kernels.check import gpu
from fusion_model.kernels.check.gpu import Part, run_parts
from fusion_model.kernels.check.report import report
from fusion_model.kernels.triton import guards

from fusion_model.cli import app

CPU = torch.device("cpu")


def parts(*names: str, each: float = 60.0, timed: bool = False) -> dict[str, Part]:
    return {name: Part(f"gpu_fake_parts:{name}", each, timed) for name in names}


def check_mixed(found: dict[str, Any]) -> None:
    assert list(found) == [
        "first", "raises", "dies", "between", "hangs", "wrong", "last but one", "hangs, too",
    ]  # fmt: skip
    good = [name for name, row in found.items() if row["ok"]]
    assert good == ["first", "between", "last but one"]
    assert found["last but one"] == {"case": "last but one", "ok": True, "us": 3.0}
    assert "ZeroDivisionError" in found["raises"]["error"]
    assert "exit 3" in found["dies"]["error"]
    assert found["hangs"]["error"] == found["hangs, too"]["error"] == "not done within 2 s"


def test_one_case_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PROCESS", [sys.executable, gpu_fake_parts.__file__])
    monkeypatch.setenv("FAKE_MARK", str(tmp_path.parent / "mark"))
    told: list[str] = []
    fakes = parts("mixed", "unlistable", "lost", each=2.0)
    results = run_parts(fakes, tmp_path, told.append, 2, "cpu")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert (tmp_path / "report.md").read_text() == report(results)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.md", "results.json"]
    check_mixed({row["case"]: row for row in results["parts"]["mixed"]})
    [none] = results["parts"]["unlistable"]
    assert "not run: exit 1" in none["error"]
    assert "no such device" in none["error"]
    rows = results["parts"]["lost"]
    assert rows[0]["ok"]
    assert ["exit 4" in rows[1]["error"], "not run: exit 1" in rows[2]["error"]] == [True, True]
    assert results["failed"] == 5 + 1 + 2
    assert sorted(told) == ["lost: 1 of 3", "mixed: 3 of 8", "unlistable: 0 of 1"]


@pytest.mark.slow
def test_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with the processes that the command starts."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    results = run_parts(parts("mixed", each=2.0), tmp_path, lambda _: None, 1, "cpu")
    check_mixed({row["case"]: row for row in results["parts"]["mixed"]})


def test_a_process_of_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    def falls_back() -> dict[str, bool]:
        expected = torch.ones(1)
        key = "rows", torch.float32, (), CPU
        assert not guards.trusted(*key, lambda: [(expected + 1, expected)])
        return {"ok": True}

    listed = [("skipped", None), ("raises", lambda: 1 / 0), ("falls back", falls_back),
              ("again", falls_back), ("good", lambda: {"ok": True})]  # fmt: skip
    monkeypatch.setattr(guards, "checked", {})
    monkeypatch.setattr(guards, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Part, "cases", lambda *_: listed)
    out = StringIO()
    gpu.work_off(Part(""), 1, CPU, out)
    plan, *lines = map(json.loads, out.getvalue().splitlines())
    assert plan == {"plan": ["skipped", "raises", "falls back", "again", "good"]}
    assert [line["begin"] for line in lines[::2]] == ["raises", "falls back", "again", "good"]
    raises, fallen, again, good = (line["result"] for line in lines[1::2])
    assert "ZeroDivisionError" in raises["error"]
    refused = {"ok": False, "fell_back": ["rows cpu torch.float32"]}
    assert fallen == {"case": "falls back"} | refused
    assert again == {"case": "again"} | refused
    assert good == {"case": "good", "ok": True}


def test_it_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed parts still run when checks take all the time that they may; the rest is noted."""
    monkeypatch.setattr(gpu, "PROCESS", [sys.executable, gpu_fake_parts.__file__])
    monkeypatch.setattr(gpu, "FOR_CHECKS", 3.0)
    monkeypatch.setattr(gpu, "BUDGET", 6.0)
    home = parts("endless")["endless"].home
    chosen = {name: Part(home, timed=name in "de") for name in "abcde"}
    began = time.monotonic()
    results = run_parts(chosen, tmp_path, lambda _: None, 2, "cpu")
    assert time.monotonic() - began < 6 + 4
    for name, begun, limit in (("a", True, 3), ("b", True, 3), ("c", False, 3), ("d", True, 6),
                               ("e", False, 6)):  # fmt: skip
        rows = results["parts"][name]
        assert len(rows) == (1000 if begun else 1)
        assert rows[0]["ok"] == begun
        assert rows[-1]["error"] == f"not run: {limit} s were over"


def test_under_eight_minutes_whatever_happens() -> None:
    assert gpu.FOR_CHECKS < gpu.BUDGET <= 470


@pytest.mark.parametrize("name", PARTS)
def test_every_part_lists_its_cases(name: str) -> None:
    names = [case for case, _ in PARTS[name].cases(CPU)]
    assert names
    assert len(set(names)) == len(names)
    assert all(callable(run) for _, run in PARTS[name].cases(CPU))


def test_parts_cover_the_issue() -> None:
    """Every operation is compared, repeated 200 times and replayed; each hang has its limit."""
    found = {name: [case for case, _ in part.cases(CPU)] for name, part in PARTS.items()}
    for kind in ("sequence", "prefix", "surprisal", "token"):
        assert any(f"200 times {kind}" in case for n in found for case in found[n])
        for dtype in ("bf16", "fp16", "fp32"):
            assert any(case.startswith(f"{kind} {dtype}") for n in found for case in found[n])
    replays = [*found["graphs"], *found["token graphs"]]
    for kind in ("replays of sequence", "graphs of a token"):
        assert any(kind in case for case in replays)
    assert len(found["hangs"]) == 2
    assert PARTS["hangs"].each <= 20
    for dtype in ("fp16", "bf16"):
        for batch in (1, 16, 64, 256):
            for mode in ("eager", "graph"):
                assert f"sequence {dtype} B{batch} H768 T256, {mode}" in found["time sequences"]


def test_goals() -> None:
    def timed(us: float, ratio: float, *tags: str) -> dict[str, Any]:
        return {"case": "x", "ok": True, "us": us, "ratio": ratio, "tags": tags}

    tags = ("token 1", "token 1 graph")
    many = timed(10.0 * 32, 3.5, *tags) | {"steps": 32}
    rows = [many, timed(16.0, 4.0, *tags), timed(5.0, 1.2, "training")]
    rows += [timed(5.0, 9.0, "prefixes"), {"case": "z", "ok": False, "tags": ["prefixes"]}]
    found = {(g["tag"], g["figure"]): (g["worst"], g["verdict"]) for g in verdicts({"time": rows})}
    assert found == {
        ("token 1 graph", "ratio"): (3.5, "met"),
        ("token 1 graph", "us"): (16.0, "not met"),
        ("sequence", "ratio"): (None, "not measured"),
        ("sequence 256", "ratio"): (None, "not measured"),
        ("training", "ratio"): (1.2, "not met"),  # whatever the rows that are missing say
        ("prefixes", "ratio"): (9.0, "not measured"),
        ("model", "ratio"): (None, "not measured"),
    }


def test_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run makes the table, where a kernel's worst row counts; the next one checks it."""

    def rows(auto: str, *ratios: float | None) -> list[dict[str, Any]]:
        return [{"auto": auto} | ({} if r is None else {"ratio": r}) for r in ratios]

    first = {
        "a": [*rows("sequence bf16", 2.0, 1.1), *rows("sequence bf16 training", 0.8, 3.0), {}],
        "b": [*rows("decode fp16", 0.9, 1.2), *rows("prefix fp16", 4.0, None)],
    }
    table, found = of_auto(first, 90)
    assert table == {
        "sm_90 sequence bf16": 1.1, "sm_90 sequence bf16 training": 0.8, "sm_90 decode fp16": 0.9
    }  # fmt: skip
    assert [g["what"].split(":")[0] for g in found] == [
        "auto takes cuDNN for sequence bf16",
        "auto takes cuDNN for sequence bf16 training",
        "auto takes the kernels for decode fp16",
        "auto takes the kernels for prefix fp16",
    ]
    assert [g["verdict"] for g in found] == ["not met", "met", "not met", "not measured"]
    monkeypatch.setattr(backend, "MEASURED", table)
    assert [g["verdict"] for g in of_auto(first, 90)[1]] == ["met"] * 3 + ["not measured"]
    assert [g["verdict"] for g in of_auto(first, 80)[1]][:3] == ["not met", "met", "not met"]


def test_every_operation_has_rows_that_decide() -> None:
    rows = [
        run.keywords.get("auto")
        for part in PARTS.values()
        if part.timed
        for _, run in part.cases(CPU)
    ]
    expected = {
        f"{operation} {kind}{mode}"
        for operation in ("sequence", "prefix", "surprisal", "decode")
        for kind in ("bf16", "fp16")
        for mode in ("", " training")
        if (operation, mode) != ("decode", " training")
    }
    assert set(rows) - {None} == expected


def test_a_full_run_has_the_rows_that_the_goals_are_of() -> None:
    rows = []
    for part in PARTS.values():
        if part.timed:
            rows += [run.keywords for _, run in part.cases(CPU)]
    for goal in GOALS:
        assert sum(goal.tag in row["tags"] for row in rows) == goal.rows, goal
    assert all(row["tags"] is not None for row in rows)
    assert GOALS[0].bound == 3.0
    assert timing.H == 768


def test_the_report_has_all_figures() -> None:
    rows = [
        {"case": "sequence a|b", "ok": True, "us": 512.0, "steps": 256, "baseline_us": 1024.0,
         "ratio": 2.0, "tags": ["sequence"], "cudnn": "persistent"},
        {"case": "token", "ok": False, "us_error": "lost", "fell_back": ["decode_token 1"]},
        {"case": "product", "ok": True, "of_budget": 0.5, "plan": "persistent"},
    ]  # fmt: skip
    results = {
        "machine": {"gpu": "H", "driver": None}, "seconds": 3.0, "failed": 1,
        "parts": {"time": rows}, "goals": verdicts({"time": rows}),
    }  # fmt: skip
    text = report(results)
    assert "# GPU check: 1 failed, 3 s\n\ngpu H\n" in text
    assert "| sequence a/b | ok | 512.00 | 2.00 | 1024.00 | 2.00 | cuDNN is persistent |" in text
    assert "| token | FAILED |  |  |  |  | lost; decode_token 1 |" in text
    assert "error 0.50 of the budget, persistent" in text
    assert "| ≥ 2 | 2.00 | 1 of 12 | not measured |" in text
    assert "| ≤ 15 |  | 0 of 2 | not measured |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["gpu-check", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output == "error: gpu-check needs a CUDA device, and PyTorch finds none here\n"


@pytest.mark.parametrize("good", [True, False])
def test_the_command(good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(chosen: Any, out: Path, tell: Any, jobs: int, **_: Any) -> dict[str, Any]:
        asked.append((list(chosen), jobs))
        tell("x: 1 of 1")
        found = {"x": [{"case": "a", "ok": good}]}
        return {"machine": {}, "parts": found, "failed": 1 - good, "seconds": 1.0,
                "goals": verdicts(found)}  # fmt: skip

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run_parts", run)
    monkeypatch.setattr(machine, "describe", lambda device: {"device": device})
    command = ["gpu-check", "--out", str(tmp_path / "new")]
    result = CliRunner().invoke(app, [*command, "--part", "hangs", "--jobs", "3"])
    assert result.exit_code == 1 - good, result.output
    assert "x: 1 of 1" in result.output
    assert "| goal | needed |" in result.output
    assert f"results.json: {1 - good} failed" in result.output
    CliRunner().invoke(app, command)
    assert asked == [(["hangs"], 3), ([*PARTS], 0)]
    result = CliRunner().invoke(app, [*command, "--part", "nothing"])
    assert "no such part, nothing: choose of generate, hangs" in result.output
