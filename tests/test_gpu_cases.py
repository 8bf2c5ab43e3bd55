"""The cases of `fusion-lm gpu-check`, tried on a CPU in the interpreter."""

import inspect
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton_bf16 import right_bfloat16

pytest.importorskip("triton")

from fusion_model.benchmarks.gpu import generate as device_check
from fusion_model.benchmarks.gpu import parts, timing
from fusion_model.kernels.check import cases, decode_cases, hangs
from fusion_model.kernels.check.cases import Case
from fusion_model.kernels.check.decode_cases import DecodeCase
from fusion_model.kernels.triton import configs, decode
from fusion_model.kernels.triton import decoder as triton_token
from fusion_model.kernels.triton.configs import KNOWN_CHIPS
from triton_programs import concurrent_programs

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _bfloat16() -> Iterator[None]:
    with right_bfloat16():
        yield


def test_cases_reach_every_kind_of_launch_on_an_h200() -> None:
    found = [case for op in ("sequence", "prefix", "surprisal") for case in cases.cases(op)]
    assert len({str(case) for case in found}) == len(found)
    kinds = set()
    for case in cases.cases("sequence"):
        dtype = cases.TYPES[case.dtype]
        args = (case.hidden, case.batch, 1, dtype, case.steps, case.training)
        plan = configs.rows_plan(KNOWN_CHIPS[90], *args)
        shape = case.hidden, case.batch, dtype, plan.units
        config = configs.sequence_config(KNOWN_CHIPS[90], *shape)
        if plan.persistent and config is not None:
            kinds.add((config.split, case.training))
        else:
            kinds.add("steps")
    assert kinds == {"steps", (True, True), (True, False), (False, True), (False, False)}


SMALL = [
    Case("sequence", "bf16", 3, 4, 5, 9, layers=2, masked=True),
    Case("sequence", "fp32", 2, 3, 4, 7, training=False),
    Case("prefix", "fp16", 2, 4, 5, 9),
    Case("surprisal", "fp32", 20, 0, 16, 30),
]
TOKEN = DecodeCase("bf16", 2, 20, 30, "gate", 2, "top 40")


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_right_kernel_passes(case: Case) -> None:
    result = cases.compare(case, CPU)
    assert result["ok"], result
    json.dumps(result)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_kernel_fails(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cases.target_log_probs

    def wrong(*args: Any, backend: str) -> torch.Tensor:
        return run(*args, backend=backend) * (factor if backend == "triton" else 1)

    monkeypatch.setattr(cases, "target_log_probs", wrong)
    result = cases.compare(SMALL[-1], CPU)
    assert not result["ok"]
    assert not result["of_budget"] <= 1


def test_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, _ in decode_cases.check(CPU)]
    assert len(set(names)) == len(names)
    result = decode_cases.compare(TOKEN, CPU)
    assert result["ok"], result
    assert decode_cases.repeated(TOKEN, CPU, 3)["ok"]
    monkeypatch.setattr(triton_token, "TokenGraph", lambda decoder: decoder)
    assert decode_cases.replayed(TOKEN, CPU, 5)["ok"]
    right = decode.kernel_token

    def another(args: Any) -> torch.Tensor:
        logits = right(args)
        args.ids.copy_(logits.argmin(-1))
        return logits

    monkeypatch.setattr(decode, "kernel_token", another)
    assert not decode_cases.compare(TOKEN, CPU)["ok"]
    monkeypatch.setattr(decode, "kernel_token", lambda args: right(args) * 1.1)
    assert not decode_cases.compare(TOKEN, CPU)["ok"]
    count = iter(range(100))
    monkeypatch.setattr(
        triton_token, "kernel_token", lambda args: args.c.add_(next(count)).sum() + right(args)
    )
    assert not decode_cases.repeated(TOKEN, CPU, 3)["ok"]
    assert not decode_cases.replayed(TOKEN, CPU, 5)["ok"]


def test_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(cases.repeated(case, CPU, 3)["ok"] for case in SMALL[1:3])
    count = iter(range(100))
    outputs = cases.outputs
    monkeypatch.setattr(cases, "outputs", lambda *a: [o + next(count) for o in outputs(*a)])
    assert not any(cases.repeated(case, CPU, 3)["ok"] for case in SMALL[1:3])


def test_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logic of the comparison: in place of a graph, a function that writes what it wrote."""

    class Graph:
        wrong = 0.0

        def __init__(self, run: Any) -> None:
            self.run, self.out = run, [t.clone() for t in run()]

        def replay(self) -> None:
            for kept, fresh in zip(self.out, self.run(), strict=True):
                kept.copy_(fresh + self.wrong)

    def record(run: Any) -> tuple[Graph, Any]:
        graph = Graph(run)
        return graph, graph.out

    monkeypatch.setattr(cases, "record", record)
    assert cases.replayed(SMALL[1], CPU, 2)["ok"]
    monkeypatch.setattr(Graph, "wrong", 1e-3)
    assert not cases.replayed(SMALL[1], CPU, 2)["ok"]


def test_what_could_hang_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hangs, "LOOKS", 5)
    with concurrent_programs():
        for name, run in hangs.hangs(CPU):
            assert run()["ok"], name


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes on the CPU, each timed call made once."""

    def once(run: Any) -> float:
        run()
        return 2.0

    monkeypatch.setattr(triton_token, "TOKENS", 2)
    for name, value in {
        "DEVICE": "cpu", "D": 8, "H": 16, "V": 20, "NAMES": {torch.float16: "fp16"},
        "microseconds": once, "graphed": lambda run: run,
    }.items():  # fmt: skip
        monkeypatch.setattr(timing, name, value)


@pytest.mark.usefixtures("small")
def test_timings_run() -> None:
    named = [
        *timing._sequence(torch.float16, 2, 16, 3, True),
        *list(timing.tokens(CPU))[:2],
        *timing.prefixes(CPU, 2, 3),
        *timing.surprisals(CPU, 10),
    ]
    assert len(named) == 4 + 2 + 4 + 4
    rows = [run() for _, run in named]
    for row in rows:
        assert row["ok"], row
        assert row["ratio"] == 1.0
    json.dumps(rows)


@pytest.mark.usefixtures("small")
def test_a_compilation_beforehand_has_no_figures() -> None:
    [(name, run), _] = parts.compiled(CPU, "time tokens")
    assert name == "2 tokens fp16 B1, eager"
    assert run() == {"ok": True}


def test_a_baseline_that_fails_is_no_failure_of_ours(small: None) -> None:
    row = timing.versus(lambda: (lambda: 1, lambda: 1 / 0), False)
    assert row["ok"]
    assert "ZeroDivisionError" in row["baseline_us_error"]
    assert "ratio" not in row
    row = timing.versus(lambda: (lambda: 1 / 0, lambda: 1), True)
    assert not row["ok"]
    assert "us" not in row


@pytest.mark.usefixtures("small")
def test_both_sides_of_a_ratio_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, modes, flattened = torch.float32, [], []
    monkeypatch.setattr(timing, "NAMES", {kind: "fp32"})
    monkeypatch.setattr(timing, "flatten", flattened.append)
    call = torch.nn.LSTM.forward

    def noting(self: Any, *args: Any) -> Any:
        modes.append((self.training, torch.is_grad_enabled()))
        return call(self, *args)

    monkeypatch.setattr(torch.nn.LSTM, "forward", noting)
    ours, theirs = timing._inference_pair(kind, 2, 16, 3)
    torch.testing.assert_close(ours()[0], theirs()[0].detach())
    for training in (False, True):
        pairs = [
            timing._training_pair(kind, 2, 16, 3),
            timing._prefixes(kind, 2, 3, training),
            timing._surprisal(kind, 10, training),
        ]
        for n, (ours, theirs) in enumerate(pairs):
            got, expected = ours(), theirs()
            if n == 1 and not training:
                got, expected = got.flatten(0, 1), expected[0]  # last h of every prefix
            torch.testing.assert_close(got, expected)
    made = []
    decoder = triton_token.Decoder
    monkeypatch.setattr(triton_token, "Decoder", lambda *a: made.append(decoder(*a)) or made[-1])
    ours, theirs = timing._tokens(kind, 3, 1)
    for _ in range(3):
        ours()
        theirs()
    ids = inspect.getclosurevars(inspect.unwrap(theirs)).nonlocals["ids"]
    assert torch.equal(ids, made[0].tokens[2])
    assert {training == gradients for training, gradients in modes} == {True}
    assert len(flattened) == 1 + 2 * 2 + 1  # a baseline each


@pytest.mark.usefixtures("small")
def test_whole_models_compute_the_same_on_both_sides() -> None:
    ways = {}
    for what in ("scoring", "generation", "training"):
        ways[what] = [device_check._run(b, CPU, what, 2, 4) for b in ("triton", "torch")]
    ours, theirs = (run().float() for run in ways["scoring"])
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)
    assert all(run().shape == (2, 4 + 4) for run in ways["generation"])
    for run in ways["training"]:
        run()
    assert [name for name, _ in device_check.times(CPU)][1] == "generation bf16 B1 T64, eager"


def test_whole_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "STEPS", 4)
    assert len(device_check.cases(CPU)) == 10
    small = {"hidden_size": 16, "embedding_size": 8}
    model = device_check._model
    monkeypatch.setattr(device_check, "_model", lambda d, **o: model(d, **(small | o)))
    result = device_check.greedy(CPU, "concat", 2, 3)
    assert result == {"ok": True}
    assert device_check.sampled(CPU, 40)["ok"]
    monkeypatch.setattr(device_check.device_generation, "obstacle", lambda *a, **k: "no")
    assert device_check.greedy(CPU, "none", 1, 1)["error"] == "it took the ordinary path"
