"""The logic of `fusion-lm gpu-check`, tried on a CPU: cases in the interpreter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from fusion_model.kernels import gpu_cases, gpu_check, gpu_timing, triton_launch
from fusion_model.kernels.gpu_cases import Case
from fusion_model.kernels.triton_launch import KNOWN_CHIPS
from triton_programs import concurrent_programs

from fusion_model.cli import app

CPU = torch.device("cpu")


def test_limits_stay_under_eight_minutes() -> None:
    assert sum(limit for _, limit in gpu_check.PARTS.values()) < 480


def test_cases_reach_every_kind_of_launch_on_an_h200() -> None:
    found = [case for op in ("sequence", "prefix", "surprisal") for case in gpu_cases.cases(op)]
    assert len({str(case) for case in found}) == len(found)
    kinds = set()
    for case in gpu_cases.cases("sequence"):
        dtype = gpu_cases.TYPES[case.dtype]
        args = (case.hidden, case.batch, 1, dtype, case.steps, case.training)
        plan = triton_launch.rows_plan(KNOWN_CHIPS[90], *args)
        config = triton_launch.sequence_config(KNOWN_CHIPS[90], case.hidden, case.batch, dtype)
        if plan.persistent and config is not None:
            kinds.add((config.split, config.staged > 0, case.training))
        else:
            kinds.add("steps")
    assert kinds == {
        "steps", (True, False, True), (True, False, False), (True, True, False),
        (False, True, False),
    }  # fmt: skip


SMALL = [
    Case("sequence", "fp16", 3, 4, 5, 9, layers=2, masked=True),
    Case("sequence", "fp32", 2, 3, 4, 7, training=False),
    Case("prefix", "fp16", 2, 4, 5, 9),
    Case("surprisal", "fp32", 20, 0, 16, 30),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_right_kernel_passes(case: Case) -> None:
    result = gpu_cases.compare(case, CPU)
    assert result["ok"], result
    json.dumps(result)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_kernel_fails(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpu_cases.target_log_probs

    def wrong(*args: Any, backend: str) -> torch.Tensor:
        return run(*args, backend=backend) * (factor if backend == "triton" else 1)

    monkeypatch.setattr(gpu_cases, "target_log_probs", wrong)
    result = gpu_cases.compare(SMALL[-1], CPU)
    assert not result["ok"]
    assert not result["of_budget"] <= 1


def test_a_case_that_raises_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cases, "cases", lambda _: SMALL[:1])
    monkeypatch.setattr(gpu_cases, "build", lambda *_: 1 / 0)
    [result] = gpu_cases.check("sequence", CPU)
    assert not result["ok"]
    assert "ZeroDivisionError" in result["error"]


def test_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cases, "REPEATED", SMALL[1:3])
    assert all(result["ok"] for result in gpu_cases.repeat(CPU, 3))
    count = iter(range(100))
    outputs = gpu_cases.outputs
    monkeypatch.setattr(gpu_cases, "outputs", lambda *a: [o + next(count) for o in outputs(*a)])
    assert not any(result["ok"] for result in gpu_cases.repeat(CPU, 3))


def test_timings_are_of_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes on the CPU, every timed call made once: none fails, all figures are there."""
    from fusion_model.kernels import triton_token

    def once(run: Any, rounds: int = 1) -> float:
        run()
        return 2.0

    for name, value in {
        "DEVICE": "cpu", "D": 8, "H": 16, "V": 20, "NAMES": {torch.float16: "fp16"},
        "microseconds": once, "graphed": lambda run: run,
    }.items():  # fmt: skip
        monkeypatch.setattr(gpu_timing, name, value)
    monkeypatch.setattr(triton_token, "TokenGraph", lambda decoder: decoder)
    rows = [
        *gpu_timing._sequence(torch.float16, 2, 3),
        *gpu_timing.decoding(),
        *gpu_timing.prefixes(2, 3),
        *gpu_timing.surprisals(10),
        gpu_timing._product(torch.float16, 16),
    ]
    with concurrent_programs():
        rows.append(gpu_timing._empty_steps(3, 5))
    assert len(rows) == 3 + 2 + 2 + 2 + 2
    for row in rows:
        assert row["ok"], row
        assert row.get("ratio", 1.0) == 1.0
    results = {"parts": {"x": rows}}
    assert all(verdict == "ok" for _, _, verdict, _ in gpu_check.rows_of(results))


def test_both_sides_of_a_ratio_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Any]] = []

    def versus(name: str, ours: Any, theirs: Any, **more: Any) -> dict[str, Any]:
        seen.append((ours(), theirs()))
        return {"case": name, "ok": True}

    for name, value in {
        "DEVICE": "cpu", "D": 8, "H": 16, "V": 20, "NAMES": {torch.float32: "fp32"},
        "versus": versus, "graphed": lambda run: run,
    }.items():  # fmt: skip
        monkeypatch.setattr(gpu_timing, name, value)
    [*_] = gpu_timing._sequence(torch.float32, 2, 3)
    [*_] = gpu_timing.prefixes(2, 3)
    [*_] = gpu_timing.surprisals(10)
    for ours, theirs in seen[:2]:
        torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(seen[2][0], seen[2][1])  # training step
    torch.testing.assert_close(seen[3][0].flatten(0, 1), seen[3][1][0])  # last h of every prefix
    for ours, theirs in seen[4:]:
        torch.testing.assert_close(ours, theirs)


def test_parts_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = gpu_check.PARTS["floors"][0]
    monkeypatch.setitem(gpu_check.PARTS, "floors", (part, 0.01))
    told: list[str] = []
    results = gpu_check.run_parts(["floors", "graphs"], tmp_path, told.append)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    if not torch.cuda.is_available():
        assert results["failed"] == 2
        assert "not done within 0.01 s" in results["parts"]["floors"][-1]["error"]
        assert results["parts"]["graphs"][0]["error"]
        assert told == ["floors: 0 of 1", "graphs: 0 of 1"]
    assert list(tmp_path.iterdir()) == [tmp_path / "results.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it says without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["gpu-check", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert result.output == "error: gpu-check needs a CUDA device, and PyTorch finds none here\n"
