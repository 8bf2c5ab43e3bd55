"""`fusion-lm bench`: cases, counts, the gate, results, the page, and mistakes."""

import json
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import typer
from conftest import SENTENCES, small_model
from fusion_model.benchmarks import summary
from fusion_model.benchmarks.measure import records as results
from fusion_model.benchmarks.measure import timing
from fusion_model.benchmarks.measure.ceilings import Ceilings
from fusion_model.benchmarks.measure.counts import Counts
from fusion_model.benchmarks.measure.machine import describe
from fusion_model.benchmarks.page.page import page
from fusion_model.benchmarks.suite import bench, encoding, gate, on_text, recurrence
from fusion_model.benchmarks.suite import cases as case_data
from fusion_model.benchmarks.suite import run as suite
from fusion_model.benchmarks.suite.cases import EAGER, Case, cases
from fusion_model.benchmarks.suite.work import Context, Unavailable, Work, WrongResult, of_case
from fusion_model.kernels import BACKENDS
from onnx_cases import saved_model
from test_cli import fails, run

from fusion_model.encoders.inputs import EncoderInput
from fusion_model.encoders.pretrained import HFEncoder
from fusion_model.errors import FusionLMError

CEILINGS = Ceilings(
    {"float32": 1e11, "bfloat16": 1e12, "int8": 2e12}, [(2**20, 1e11), (2**28, 1e10)]
)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context("cpu", "fusion-lm-small", SENTENCES[:1], tmp_path, new_tokens=3)


def test_cases_are_unique_and_every_group_has_its_plain_one() -> None:
    for name in case_data.SUITES:
        found = cases(name)
        assert len({str(c) for c in found}) == len(found)
        assert {c.group for c in found} == {c.group for c in found if c.backend == EAGER}
        assert {c.operation for c in found} == set(case_data.OPERATIONS)


def test_cases_name_every_backend_of_ours_and_what_it_is() -> None:
    for backend in BACKENDS:
        assert any(c.backend == backend for c in cases("quick"))
    assert {c.way for c in cases("full")} <= set(case_data.WAYS)


def test_only_chooses_operations_and_backends() -> None:
    assert {c.operation for c in cases("quick", ["step", "head"])} == {"step", "head"}
    assert {c.backend for c in cases("quick", ["onnx"])} == {"onnx", EAGER}
    with pytest.raises(FusionLMError, match="unknown 'stepp'"):
        cases("quick", ["stepp"])
    with pytest.raises(FusionLMError, match="training: not measured with compile, but step, seq"):
        cases("quick", ["training", "compile"])


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_left_out_without_hardware_for_it(fast: bool, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    chosen = cases("full", ["embedding", "head"])
    kept = bench.affordable(chosen, "cpu")
    assert {c.dtype for c in kept} == {"float32"} | ({"bfloat16"} if fast else set())
    assert [c for c in chosen if c.dtype == "float32"] == [c for c in kept if c.dtype == "float32"]
    assert ("no hardware" in capsys.readouterr().err) == (not fast)
    own = case_data.own_cases({"dtype": "bfloat16"}, ["head"])  # asked for by name
    assert bench.affordable(own, "cpu") == own


def test_counts_of_a_step_by_hand() -> None:
    case = Case("step", EAGER, batch=2, hidden_size=3, embedding_size=5)
    weights = 4 * 3 * 5 + 4 * 3 * 3 + 2 * 4 * 3
    moved = weights + 2 * 5 + 2 * 3 + 4 * 2 * 3  # x, output, both states in and out
    assert of_case(case) == Counts(2 * (2 * 4 * 3 * (5 + 3)), 4 * moved)


def test_a_floor_takes_the_bandwidth_of_what_is_held() -> None:
    """Weights that a cache holds are read from it again and again, however many bytes that is."""
    counts = Counts(0, 2.0**29, 2.0**21)
    assert CEILINGS.floor(counts, "float32") == (2**29 / 1e11, "memory")
    assert (counts + counts).reach == 2**22
    assert Counts(1, 5.0).reach == 5


def test_counts_of_prefixes_grow_with_the_square_of_the_length() -> None:
    """Counted against the steps that the plain loop over prefixes takes."""
    case = Case("prefixes", EAGER, batch=1, length=10, hidden_size=64, embedding_size=1)
    steps = sum(range(1, 11))
    assert of_case(case).flops == pytest.approx(2 * 4 * 64 * (64 * steps + 10))


def test_a_wrong_backend_is_not_timed(context: Context, monkeypatch) -> None:
    exact = recurrence.lstm_sequence

    def wrong(*args: object, **kwargs: object):
        out, state = exact(*args, **kwargs)
        return out + 0.01 * (kwargs["backend"] == "torch"), state

    monkeypatch.setattr(recurrence, "lstm_sequence", wrong)
    records = list(suite.run(cases("tiny", ["step"]), context, CEILINGS, 0.0))
    by_backend = {r["backend"]: r for r in records}
    assert by_backend["torch"]["kind"] == "wrong"
    assert "p50_ms" not in by_backend["torch"]
    assert by_backend["reference"]["kind"] == "case"


def test_a_backend_that_fails_is_named_and_the_others_run(context: Context, monkeypatch) -> None:
    exact = recurrence.lstm_sequence

    def broken(*args: object, **kwargs: object):
        if kwargs["backend"] == "reference" and torch.is_inference_mode_enabled():
            raise RuntimeError("no kernel\nfor this")
        return exact(*args, **kwargs)

    monkeypatch.setattr(recurrence, "lstm_sequence", broken)
    records = list(suite.run(cases("tiny", ["step"]), context, CEILINGS, 0.0))
    by_backend = {r["backend"]: r for r in records}
    assert by_backend["reference"]["reason"] == "RuntimeError: no kernel"
    assert by_backend["torch"]["kind"] == "case"


def test_uneven_times_are_pointed_out() -> None:
    even = {"kind": "case", "group": "step", "backend": "torch", "p50_ms": 1.0, "p90_ms": 1.2}
    even |= {"of_floor": 0.9}
    assert bench.remarks([even]) == []
    (line,) = bench.remarks([even, even | {"p90_ms": 3.5}])
    assert line.startswith("uneven: in 1 cases")
    (line,) = bench.remarks([even, even | {"of_floor": 1.1}])
    assert line.startswith("above 100 % of the floor")
    assert line.endswith(": step torch")


def test_an_interrupted_run_keeps_what_it_has(tmp_path: Path) -> None:
    def interrupted():
        yield {"kind": "skip", "group": "a"}
        raise KeyboardInterrupt

    first = {"kind": "run", "run": "1", "machine": {"date": "2026-01-02T03", "device": "cpu"}}
    with pytest.raises(KeyboardInterrupt):
        list(results.append(tmp_path, first, interrupted()))
    ((_, records),) = results.read(tmp_path / "2026-01-02-cpu.jsonl")
    assert [r["group"] for r in records] == ["a"]


@pytest.mark.parametrize("bad", [float("nan"), 2.0])
def test_check_refuses_nan_and_shapes(bad: float) -> None:
    good = torch.ones(3)
    work = Work(lambda: None, lambda: good * bad, lambda: good, 1, Counts(1, 1), 1e-4)
    with pytest.raises(WrongResult):
        work.check()
    shape = Work(lambda: None, lambda: good[:2], lambda: good, 1, Counts(1, 1), 1e-4)
    with pytest.raises(WrongResult, match="shape"):
        shape.check()


def test_absent_backends_are_skipped_with_a_reason(context: Context) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA graph can be had here")
    records = list(suite.run(cases("tiny", ["cuda-graph"]), context, CEILINGS, 0.0))
    assert {r["reason"] for r in records if r["kind"] == "skip"} == {"a CUDA graph needs a GPU"}
    assert "skipped cuda-graph (3): a CUDA graph needs a GPU" in bench.remarks(records)


def test_backends_take_turns_and_the_first_call_is_apart() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    timings = timing.measure_in_turns(runs, "cpu", 0.0, least=2)
    assert order[:2] == ["a", "b"]
    for name in "ab":
        assert order.count(name) == len(timings[name].seconds) + 1  # budget 0: no warming call


def test_peak_memory_is_what_a_call_holds_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            torch.empty(1_000_000, dtype=torch.uint8).fill_(1)

    assert 1_000_000 <= timing.peak_memory(run, "cpu") < 1_100_000


def test_floor_is_the_slower_of_memory_and_compute() -> None:
    assert CEILINGS.floor(Counts(1e9, 10), "float32") == (0.01, "compute")
    assert CEILINGS.floor(Counts(1, 1e9), "float32") == (0.1, "memory")
    assert CEILINGS.floor(Counts(1, 1e6), "float32") == (1e-5, "memory")  # from the cache


def outcome(tmp_path: Path, *only: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    chosen = cases("tiny", only)
    return bench.bench(chosen, "tiny", "fusion-lm-small", (), "cpu", tmp_path, "fusion-lm bench")


def test_results_are_appended_and_read_back(tmp_path: Path) -> None:
    (first, records), (second, _) = outcome(tmp_path, "step"), outcome(tmp_path, "head")
    runs = results.read(results.file_of(tmp_path, first))
    assert [run["run"] for run, _ in runs] == [first["run"], second["run"]]
    assert [r["group"] for r in runs[0][1]] == [r["group"] for r in records]
    for record in results.measured(runs[0][1]):
        assert record["p50_ms"] <= record["p90_ms"] <= record["p99_ms"]
        assert record["of_floor"] == pytest.approx(
            record["floor_ms"] / record["p50_ms"], rel=0.01, abs=1e-4
        )
    machine = runs[0][0]["machine"]
    assert {"name", "cpu_mhz", "versions", "commit", "date"} <= set(machine)


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"kind": "case"}\n')
    with pytest.raises(FusionLMError, match="not a file of benchmark results"):
        results.read(bad)


def test_speeds_are_compared_item_by_item() -> None:
    """The plain way may be called with a part of the text only."""
    eager, ours = (Case("embedding", name) for name in ("eager", "fusion-lm/every"))
    records = [
        eager.facts() | {"p50_ms": 2.0, "items": 4},
        ours.facts() | {"p50_ms": 5.0, "items": 20},
    ]
    assert [r["speedup"] for r in suite.with_speedups(records)] == [1, 2]


def test_gate_sees_ratios_not_times(tmp_path: Path, capsys) -> None:
    run = {"kind": "run", "run": "1", "machine": describe("cpu")}
    timed = [
        c.facts() | {"kind": "case", "p50_ms": i + 1.0, "p90_ms": i + 1.5, "items": 2}
        for i, c in enumerate(cases("tiny", ["step"]))
    ]
    list(results.append(tmp_path, run, suite.with_speedups(timed)))
    kept = results.file_of(tmp_path, run)
    baseline = tmp_path / "baseline.json"
    gate.main([kept], write=True, baseline=baseline)
    with pytest.raises(typer.Exit) as ended:
        gate.main([kept], baseline=baseline)
    assert ended.value.exit_code == 0
    (run, records), loaded = results.read(kept)[0], gate.load_baseline(baseline)
    slower = [r | {"p50_ms": 10 * r["p50_ms"]} for r in records]
    assert gate.compare(run["machine"], suite.with_speedups(slower), loaded) == []
    auto = slower[0]
    assert auto["backend"] == "auto"
    worse = [auto | {"speedup": 0.1 * auto["speedup"]}, *slower[1:]]
    (line,) = gate.compare(run["machine"], worse, loaded)
    assert line.startswith("step B2 T1 H32 float32 auto: ")
    wrong = [{"kind": "wrong", "reason": "no kernel", "group": "g", "backend": "auto"}, *slower[1:]]
    assert gate.compare(run["machine"], wrong, loaded) == ["g auto: no kernel"]
    uneven = [auto | {"p90_ms": 99 * auto["p50_ms"]}, *slower[1:]]
    assert gate.ratios(slower).keys() - gate.ratios(uneven).keys() == {f"{auto['group']} auto"}
    several = gate.medians([(run, worse), (run, records), (run, records)])
    assert several[gate.kind_of(run["machine"])] == gate.medians([(run, records)]).popitem()[1]
    with pytest.raises(FusionLMError, match="no baseline for another"):
        gate.compare(run["machine"] | {"name": "another"}, records, loaded)


def test_committed_baseline_has_ratios_of_cases_that_exist() -> None:
    known = {f"{c.group} {c.backend}" for c in cases("full") + cases("quick")}
    for ratios in gate.load_baseline().values():
        assert set(ratios) <= known


class Tags(HTMLParser):
    """Fails on what would need a network; collects what is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.charts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href"} & {name for name, _ in attrs}
        self.charts += tag == "svg"
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    run, records = outcome(tmp_path, "step", "sequence", "head")
    text = page(run | {"command": "fusion-lm bench <&>"}, records)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.charts == 1  # of one shape there is no curve
    assert "http" not in text
    assert "fusion-lm bench &lt;&amp;&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    timed = results.measured(records)
    assert text.count('<td class="bar">') == len(timed)
    for record in timed:
        row = text.index(f"<td>{record['backend']}</td>", text.index(f"<h3>{record['group']}"))
        cells = text[row : text.index("</tr>", row)]
        assert all(f">{cell(record)}</td>" in cells for cell in bench.PAGE_COLUMNS.values())


def test_bench_command(tmp_path: Path) -> None:
    report = tmp_path / "out.html"
    shape = ["--hidden-size", 16, "--batch", 2, "--length", 3]
    keep = ["--quick", "--results", tmp_path, "--report", report]
    code, stdout, _ = run("bench", "--only", "step", *shape, "--backend", "reference", *keep)
    assert code == 0
    assert "step B2 T1 H16 float32" in stdout
    assert report.read_text().startswith("<!doctype html>")
    (file,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert {r["backend"] for r in records} == {"reference", EAGER}


def test_bench_takes_sizes_from_a_model() -> None:
    chosen = bench.chosen_cases("quick", [], {"batch": 3}, None, "fusion-lm-small")
    sizes = {(c.hidden_size, c.vocab_size, c.batch) for c in chosen if c.operation == "training"}
    assert sizes == {(384, 8192, 3)}
    assert "scoring" in {c.operation for c in chosen}
    only = bench.chosen_cases("quick", ["batched"], {"dtype": "bfloat16"}, None, "fusion-lm-small")
    assert {(c.backend, c.dtype) for c in only} == {("batched", "bfloat16"), (EAGER, "bfloat16")}


def test_bench_leaves_out_what_is_not_the_models_own(
    tmp_path: Path, bpe, bert_folder, capsys
) -> None:
    """`training` and `evaluation` are of one layer and concatenation."""
    model = str(saved_model(tmp_path / "m", bpe, bert_folder, num_layers=2, fusion="concat"))
    chosen = bench.chosen_cases("quick", [], {}, None, model)
    assert not {c.operation for c in chosen} & {"training", "evaluation"}
    assert "training and evaluation left out" in capsys.readouterr().err
    with pytest.raises(FusionLMError, match="of training there is nothing to measure with"):
        bench.chosen_cases("quick", ["training"], {}, None, model)


def test_policies_that_differ_are_said() -> None:
    timed = [
        {"kind": "case", "group": "scoring float32", "backend": name, "policy": policy}
        | {"p50_ms": 1.0, "p90_ms": 1.0, "of_floor": 0.5}
        for name, policy in (("eager", "every"), ("auto", "incremental"), ("onnx", "incremental"))
    ]
    (line,) = bench.remarks(timed)
    assert line == "scoring float32: encoded by policy every: eager; policy incremental: auto, onnx"
    assert bench.remarks(timed[1:]) == []


def test_bench_mistakes_are_one_line(tmp_path: Path) -> None:
    word = tmp_path / "word.txt"
    word.write_text("Hello\n")
    keep = ("--quick", "--results", tmp_path)
    assert "unknown 'stepp'" in fails("bench", "--only", "stepp", *keep)
    assert "unknown 'cudann'" in fails("bench", "--backend", "cudann", *keep)
    assert "unknown dtype 'int4'" in fails("bench", "--dtype", "int4", *keep)
    assert "no-such-model" in fails("bench", "no-such-model", *keep)
    assert "1 word:" in fails("bench", "--only", "scoring", "--text", word, *keep)
    assert "cannot read" in fails("bench", "--only", "scoring", "--text", tmp_path / "no", *keep)
    assert not list(tmp_path.glob("*.jsonl"))


def test_text_cases_refuse_what_they_are_not_written_for() -> None:
    lm = type("LM", (), {"model": small_model(fusion="init_both"), "planner": None})()
    with pytest.raises(Unavailable, match="late fusion"):
        on_text.Plain(lm, EAGER)


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_the_plain_encoder_agrees_and_runs_no_layer_for_nothing(encoder_folders, name) -> None:
    encoder = HFEncoder.load(str(encoder_folders[name]), "static+mean@1+last@1+cls@1")
    inputs = encoder.inputs_from_texts(["", "The cat sat on the mat.", "A dog", *SENTENCES[:4]])
    calls = []
    layer = encoding.layers_of(encoder)[1]
    with torch.inference_mode(), patch.object(layer, "forward", calls.append):
        found = [encoding.PlainEncoder(encoder, size)(inputs) for size in (1, 3)]
    assert not calls
    assert len(encoding.layers_of(encoder)) == 2
    alone = torch.cat([encoder.pooled(torch.tensor([list(_ids(i))])) for i in inputs])
    for vectors in found:
        torch.testing.assert_close(vectors, alone)


def _ids(given: EncoderInput) -> list[int]:
    return np.frombuffer(given.ids, dtype="<i4").tolist()


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory, bpe, bert_folder) -> list[dict[str, Any]]:
    """Every way and policy, of small models."""
    folder = tmp_path_factory.mktemp("figures")
    options = {"num_layers": 1, "prefix_size": 48, "pooling": "static+last@1+mean@1"}
    options |= {"policy": "incremental", "fusion": "concat"}
    saved_model(folder / "m", bpe, bert_folder, **options)
    saved_model(folder / "m-unfused", bpe, bert_folder, **(options | {"fusion": "none"}))
    context = Context("cpu", str(folder / "m"), SENTENCES[:3], folder, new_tokens=4)
    chosen = cases("figures", ["scoring", "generation"])
    with context.closing:
        return list(suite.run(chosen, context, CEILINGS, 0.0))


def test_every_way_and_policy_agrees_with_the_plain_equations(figures) -> None:
    """Those that do not are `wrong`; all make as many tokens as were asked for."""
    assert [r.get("reason") for r in figures if r["kind"] != "case"] == []
    assert {r["items"] for r in figures if r["operation"] == "generation"} == {4}
    named = {(r["backend"], r["policy"]) for r in figures if "policy" in r}
    assert named == {(name, "every") for name in on_text.PLAIN}
    assert len({r["items"] for r in figures if r["operation"] == "scoring"}) == 1
    table = summary.ways(figures)
    assert table.count("\n") == 13
    assert "| fusion-lm, ONNX int8 | incremental |" in table
    assert "| plain PyTorch, in batches | every |  |" in table


def test_level_is_said_in_words() -> None:
    assert summary.ratio(1.02, 1) == summary.ratio(0.96, 1) == "level"
    assert summary.ratio(3.0, 1.5) == "**2×**"


def test_memory_that_does_not_suffice_is_no_wrong_result(context: Context, monkeypatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")

    monkeypatch.setattr(recurrence, "lstm_sequence", full)
    records = list(suite.run([Case("step", "reference")], context, CEILINGS, 0.0))
    assert [(r["kind"], r["reason"]) for r in records] == [("skip", "out of memory")]


def test_own_shape_is_the_only_one() -> None:
    shape = {"hidden_size": 512, "batch": 8}
    chosen = bench.chosen_cases("full", ["step"], shape, None, None)
    assert {(c.hidden_size, c.batch, c.length) for c in chosen} == {(512, 8, 1)}


def test_results_go_where_git_ignores_them() -> None:
    home = results.home()
    assert home is not None
    assert subprocess.run(["git", "check-ignore", "-q", home], cwd=home.parents[1]).returncode == 0


def test_machine_is_described() -> None:
    machine = describe("cpu")
    assert machine["threads"] == torch.get_num_threads()
    assert machine["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{12}\+?|None", str(machine["commit"]))
