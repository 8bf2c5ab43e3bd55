"""Which backend, which launch, and what stands between a launch and a hang: pure functions."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from fusion_model.kernels import backend, lstm_sequence, resolve_backend
from fusion_model.kernels.backend import choose, obstacle
from fusion_model.kernels.triton import guards
from fusion_model.kernels.triton.configs import (
    KNOWN_CHIPS,
    SequenceConfig,
    chip_of,
    padded,
    rows_plan,
    sequence_backward_config,
    sequence_config,
    step_config,
    step_units,
)
from fusion_model.kernels.triton.guards import LaunchRefused, check_grid, close, trusted
from fusion_model.kernels.triton.layout import Rows

BF16, FP32 = torch.bfloat16, torch.float32
H200 = KNOWN_CHIPS[90]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("sequence", "cpu", 0, FP32, 1, True), "reference"),
        (("sequence", "cpu", 0, FP32, 2, True), "torch"),
        (("prefix", "cpu", 0, FP32, 1, True), "torch"),
        (("prefix", "cuda", 90, BF16, None, True), "triton"),
        (("surprisal", "cuda", 80, torch.float16, None, True), "triton"),
        (("surprisal", "cuda", 90, BF16, None, False), "torch"),
        (("surprisal", "cuda", 75, BF16, None, True), "torch"),
        (("prefix", "cuda", 90, FP32, None, True), "torch"),
        (("prefix", "cuda", 90, None, None, True), "torch"),
        (("sequence", "cuda", 90, BF16, 100, True), "torch"),
        (("decode", "cuda", 90, BF16, None, True), "triton"),
        (("decode", "cuda", 90, FP32, None, True), "torch"),
        (("decode", "cuda", 90, BF16, None, False), "torch"),
        (("decode", "cpu", 0, BF16, None, True), "torch"),
    ],
)
def test_auto(arguments: Any, expected: str) -> None:
    assert choose(*arguments) == expected


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_few_rows_are_shared_out(dtype: torch.dtype) -> None:
    """Many programs, and as many stages as fit on the smallest chips."""
    for rows in (1, 16, 17, 33, 64, 65, 8192):
        for hidden in (5, 64, 512, 768, 1024, 1500):
            units = step_units(rows, hidden)
            tile = step_config(rows, dtype, units)
            lanes = tile.rows + 4 * tile.columns
            assert (tile.stages - 1) * lanes * tile.depth * dtype.itemsize <= 101_376
            assert padded(hidden, units) % units == 0
            if rows <= 16 and hidden >= 512:
                assert padded(hidden, units) // units >= 64
                assert tile.stages >= (7 if hidden <= 1024 else 5)
    assert padded(768, step_units(1, 768)) // step_units(1, 768) == 96


def test_auto_goes_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"sm_90 sequence bf16": 1.0, "sm_90 prefix bf16 training": 0.99, "sm_90 decode fp16": 0}
    monkeypatch.setattr(backend, "MEASURED", table)

    def taken(operation: str, dtype: torch.dtype = BF16, chip: int = 90, **more: bool) -> str:
        return choose(operation, "cuda", chip, dtype, None, True, **more)

    assert taken("sequence") == taken("prefix") == taken("decode") == "triton"
    for other in (
        taken("sequence", training=True), taken("sequence", torch.float16),
        taken("sequence", chip=80), taken("prefix", training=True), taken("decode", torch.float16),
    ):  # fmt: skip
        assert other == "torch"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("cudnn", "cpu", 0, FP32, True), "CUDA device.*cpu"),
        (("triton", "cuda", 90, BF16, False), "not installed"),
        (("triton", "cuda", 70, BF16, True), r"compute capability 8.0.*7.0"),
        (("triton", "cuda", 90, torch.float64, True), "not in torch.float64"),
        (("triton", "mps", 0, BF16, True), "CUDA device.*mps"),
    ],
)
def test_what_cannot_run_says_why(arguments: Any, reason: str) -> None:
    found = obstacle(*arguments)
    assert found is not None
    assert re.search(reason, found)


def test_what_can_run_has_no_obstacle() -> None:
    assert obstacle("triton", "cuda", 80, BF16, True) is None
    assert obstacle("cudnn", "cuda", 70, BF16, False) is None
    assert obstacle("reference", "mps", 0, torch.float64, False) is None


def test_triton_on_a_cpu_is_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, s = torch.randn(1, 2, 3), torch.zeros(1, 1, 4)
    with pytest.raises(ValueError, match=r"'triton' cannot run here: it needs a CUDA device.*cpu"):
        lstm_sequence(x, (s, s), torch.nn.LSTM(3, 4).all_weights, backend="triton")
    with pytest.raises(ValueError, match="'cudnn' cannot run here"):
        resolve_backend("cudnn", "cpu")


@pytest.mark.parametrize("chip", KNOWN_CHIPS.values(), ids=KNOWN_CHIPS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_persistent_launches_fit(chip: Any, dtype: torch.dtype) -> None:
    """Whatever is chosen fits on the chip at once, holds all of W, and covers all sequences."""
    for hidden in (1, 16, 100, 512, 650, 768, 1024, 1025, 1500, 2048, 3000):
        for batch in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 300, 2000):
            for training in (False, True):
                plan = rows_plan(chip, hidden, batch, 1, dtype, 10, training)
                if not plan.persistent:
                    continue
                shape = chip, hidden, batch, dtype, plan.units
                configs = [sequence_config(*shape)]
                depths = [1]
                if training:
                    configs.append(sequence_backward_config(*shape))
                    depths.append(4)
                for config, depth in zip(configs, depths, strict=True):
                    assert config is not None
                    assert config.units == plan.units
                    width = padded(hidden, config.units)
                    check_grid(chip, config.programs(width) * config.groups(batch), "x")
                    assert config.programs(width) * config.units == width
                    assert config.groups(batch) * config.columns >= batch
                    chunks = config.chunk * config.chunks
                    assert chunks * (config.warps if config.split else 1) >= depth * width
                    assert config.chunks % config.phase == 0
                    w = 4 * config.units * chunks  # in shared memory, unless split
                    room = 2 * (w + config.phase * config.chunk * config.columns)
                    assert config.split or room <= chip.shared


def test_expected_plans() -> None:
    def persistent(hidden: int, batch: int, training: bool, chip: Any = H200) -> bool:
        return rows_plan(chip, hidden, batch, 1, BF16, 10, training).persistent

    assert all(persistent(768, b, False) for b in (1, 16, 64, 256))
    assert all(persistent(768, b, True) for b in (1, 16, 32, 64))  # two groups of 32
    assert all(persistent(h, b, True) for h, b in ((512, 128), (650, 96), (1024, 64)))
    assert not persistent(768, 96, True)
    assert not persistent(768, 32, True, KNOWN_CHIPS[80])
    assert not persistent(1500, 16, False)
    whole = [sequence_config(H200, 768, batch, BF16, 8) for batch in (8, 32)]
    whole.append(sequence_backward_config(H200, 768, 16, BF16, 8))
    assert all(c is not None and c.phase == c.chunks for c in whole)  # all of a step at once
    assert [c is not None and c.peek for c in whole] == [False, True, True]
    assert not persistent(768, 16, False, replace(H200, sms=20))
    assert not persistent(768, 16, False, replace(H200, cooperative=False))
    assert not rows_plan(H200, 768, 16, 1, BF16, 1, False).persistent  # a single step
    assert not rows_plan(H200, 768, 16, 5, BF16, 10, False).persistent  # prefixes


def test_a_grid_that_does_not_fit_is_refused() -> None:
    check_grid(H200, 132, "k")
    with pytest.raises(LaunchRefused, match="k: 133 programs do not fit on 132"):
        check_grid(H200, 133, "k")
    with pytest.raises(LaunchRefused, match="refuses cooperative"):
        check_grid(replace(H200, cooperative=False), 1, "k")


def test_an_interpreter_is_no_gpu() -> None:
    """Its programs run one after another, wherever the tensors are: none may wait for another."""
    assert not chip_of(torch.device("cuda")).cooperative


def test_rows() -> None:
    rows = Rows(batch=2, steps=4, count=3)
    assert [rows.active(t) for t in range(4)] == [6, 6, 4, 2]
    assert rows.offsets() == [0, 6, 12, 16, 18]
    assert Rows(3, 2, 1).offsets() == [0, 3, 6]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check as it runs where nothing is interpreted or captured."""
    monkeypatch.setattr(guards, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(guards, "checked", {})


CPU = torch.device("cpu")
RIGHT = torch.ones(2), torch.ones(2)


@pytest.mark.usefixtures("on_a_gpu")
def test_a_kernel_is_checked_once() -> None:
    calls = []

    def trial() -> list[Any]:
        calls.append(trusted("k", FP32, (1,), CPU, lambda: 1 / 0))  # from within
        return [RIGHT]

    assert all(trusted("k", FP32, (1,), CPU, trial) for _ in range(3))
    assert calls == [True]
    assert trusted("k", FP32, (2,), CPU, trial)
    assert trusted("k", BF16, (1,), CPU, trial)
    assert len(calls) == 3


@pytest.mark.usefixtures("on_a_gpu")
def test_a_wrong_kernel_is_named_and_not_used() -> None:
    wrong = torch.zeros(2), torch.ones(2)
    with pytest.warns(RuntimeWarning, match="rows .*not used on cpu.*differ"):
        assert not trusted("rows", FP32, (1,), CPU, lambda: [RIGHT, wrong])
    with pytest.warns(RuntimeWarning, match="lines .*ZeroDivisionError"):
        assert not trusted("lines", FP32, (1,), CPU, lambda: 1 / 0)
    assert not trusted("rows", FP32, (1,), CPU, lambda: [RIGHT])  # remembered, without a warning


@pytest.mark.usefixtures("on_a_gpu")
def test_a_layer_falls_back_to_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from fusion_model.kernels.triton import lstm_operator

    monkeypatch.setattr(lstm_operator, "steps_forward", lambda *_: None)  # writes nothing
    monkeypatch.setattr(lstm_operator, "steps_backward", lambda *_: 1 / 0)
    module = torch.nn.LSTM(3, 5, batch_first=True)
    x, zeros = torch.randn(2, 4, 3), torch.zeros(2, 1, 5)
    with pytest.warns(RuntimeWarning, match="rows_forward"):
        out, _ = lstm_sequence(x, (zeros, zeros), module.all_weights, backend="triton")
    with pytest.warns(RuntimeWarning, match="rows_backward.*ZeroDivisionError"):
        [gradient] = torch.autograd.grad(out.sum(), module.weight_hh_l0)
    expected = module(x)[0]
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(expected.sum(), module.weight_hh_l0)[0]
    )


@pytest.mark.usefixtures("on_a_gpu")
def test_a_first_launch_waits_for_a_second_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A persistent kernel that hangs must come to the comparison, which then fails."""
    pytest.importorskip("triton")
    from fusion_model.kernels.triton import layout, lstm_naive, lstm_operator
    from fusion_model.kernels.triton.lstm_sequence import LOOKS

    seen = []

    def sequence(args: Any, config: Any, looks: int = LOOKS) -> None:
        seen.append(looks)
        lstm_naive.plain_forward(args)

    config = SequenceConfig(8, 8, 2, 16, 1, True)
    monkeypatch.setattr(lstm_operator, "sequence_config", lambda *_: config)
    monkeypatch.setattr(lstm_operator, "sequence_forward", sequence)
    w, h, c = torch.randn(64, 16), torch.zeros(4, 16), torch.zeros(1, 16)
    gates = torch.randn(3, 64)
    args = layout.Forward(gates, None, w, h, c, None, None, None, Rows(1, 3, 1), True, 8)
    for _ in range(2):
        lstm_operator._run(True, args)
    assert seen == [lstm_operator.TRIAL, LOOKS, LOOKS]
    assert lstm_operator.TRIAL < 1 << 21


def test_close() -> None:
    a = torch.randn(100)
    assert close(a + 1e-6, a, FP32)
    assert not close(a + 1e-2, a, FP32)
    assert close(a + 1e-2, a, BF16)
    assert not close(a * float("nan"), a, BF16)
    assert not close(torch.zeros(100), 1e-7 * a, BF16)  # as gradients of a mean may be
    assert close(torch.zeros(100), torch.zeros(100), BF16)


@pytest.mark.usefixtures("on_a_gpu")
def test_an_overflow_decides_nothing() -> None:
    """A loss scale that overflows gives infinity on both sides: the next call is tried anew."""
    one = torch.ones(1)
    key = "kernel", BF16, (), CPU
    assert not trusted(*key, lambda: [(one / 0, one / 0)])
    assert trusted(*key, lambda: [(one, one)])
