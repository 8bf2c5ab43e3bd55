"""`fusion-lm profile`: the parts add up, each stage is told apart, and mistakes are one line."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES
from fusion_model.benchmarks.profile import engines, latency
from fusion_model.benchmarks.profile.engines import (
    ENCODER,
    HOST,
    LSTM,
    PARTS,
    TOKENISER,
    VOCABULARY,
)
from fusion_model.benchmarks.profile.spans import Recorder, replaced
from test_cli import fails, run

import fusion_model
from fusion_model.encoders.pretrained import HFEncoder
from fusion_model.errors import FusionLMError


class Clock:
    """Stands still but for what is asked of it."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def slow(self, function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
        """The function, taking so long."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.time += seconds
            return function(*args, **kwargs)

        return call


def test_nested_spans_count_once() -> None:
    clock = Clock()
    recorder = Recorder(clock)
    inner = recorder.spanned(clock.slow(lambda: None, 2.0), "inner")

    def outer() -> None:
        clock.time += 1.0
        inner()
        inner()
        clock.time += 0.5

    recorder.spanned(outer, "outer")()
    assert recorder.take() == {"inner": 4.0, "outer": 1.5}
    assert recorder.take() == {}
    assert [(s.name, s.end - s.start) for s in recorder.spans][-1] == ("outer", 5.5)


def test_a_span_ends_where_its_function_raises() -> None:
    clock = Clock()
    recorder = Recorder(clock)
    with pytest.raises(ZeroDivisionError):
        recorder.spanned(clock.slow(lambda: 1 / 0, 2.0), "bad")()
    recorder.spanned(clock.slow(lambda: None, 1.0), "next")()
    assert recorder.take() == {"bad": 2.0, "next": 1.0}


def test_replaced_puts_back_what_was_there() -> None:
    class Thing:
        def method(self) -> str:
            return "own"

    thing = Thing()
    with replaced(thing, "method", lambda: "other"):
        assert thing.method() == "other"
    assert thing.method() == "own"
    assert vars(thing) == {}


@pytest.fixture
def lm() -> fusion_model.FusionLM:
    return fusion_model.load("fusion-lm-small")


def slowed(lm: Any, clock: Clock) -> Any:
    """Each stage takes a known time, and nothing else any."""
    model, planner = lm.model, lm.planner
    encoder = planner.encoder
    encoder.inputs_from_texts = clock.slow(encoder.inputs_from_texts, 0.001)
    encoder.input_of = clock.slow(encoder.input_of, 0.001)
    encoder.encode = clock.slow(encoder.encode, 0.010)
    encoder.run = clock.slow(encoder.run, 0.010)  # as texts grow
    model.features = clock.slow(model.features, 0.100)
    model.lm_head.forward = clock.slow(model.lm_head.forward, 1.0)
    model.encode_prefixes = clock.slow(model.encode_prefixes, 10.0)
    return lm


def test_each_stage_of_generation_gets_its_own_time(lm: fusion_model.FusionLM) -> None:
    """Against a clock that only these stages move."""
    clock = Clock()
    engine = engines.TorchEngine(slowed(lm, clock))
    found = latency.profile(engine, SENTENCES, runs=2, tokens=4, recorder=Recorder(clock))
    for plain, split in found.generation:
        # The first call encodes all prefixes of the prompt at once; then one a token.
        assert len(split.parts) == 5
        for parts in split.parts[:4]:
            expected = {TOKENISER: 0.001, ENCODER: 0.010, LSTM: 0.100, VOCABULARY: 1.0, HOST: 10.0}
            assert parts == pytest.approx(expected)
        assert split.parts[4] == pytest.approx({HOST: 0.0})
        for p in (plain, split):
            assert p.tokens == pytest.approx([11.111] * 4 + [0.0])
            assert p.wall == pytest.approx(4 * 11.111)


def test_scoring_is_split_too(lm: fusion_model.FusionLM) -> None:
    clock = Clock()
    engine = engines.TorchEngine(slowed(lm, clock))
    with replaced(lm, "log_probs", clock.slow(lm.log_probs, 2.0)):
        found = latency.profile(engine, SENTENCES, runs=2, tokens=3, recorder=Recorder(clock))
    for _, split in found.scoring:
        (parts,) = split.parts
        assert parts == pytest.approx(
            {TOKENISER: 0.001, ENCODER: 0.010, LSTM: 0.100, VOCABULARY: 2.0, HOST: 0.0}
        )
        assert split.words == len(SENTENCES[0].split()) + 1


def test_parts_add_up_to_the_whole_on_the_real_clock(lm: fusion_model.FusionLM) -> None:
    """The parts against the wall time around the same calls, taken here."""
    engine, walls = engines.TorchEngine(lm), []
    one_pass = latency.one_pass

    def timed(recorder: Recorder, call: Any, spans: bool) -> latency.Pass:
        start = time.perf_counter()
        found = one_pass(recorder, call, spans)
        walls.append((time.perf_counter() - start, found))
        return found

    with replaced(latency, "one_pass", timed):
        latency.profile(engine, SENTENCES, runs=2, tokens=8)
    split = [(wall, p) for wall, p in walls if p.parts]
    assert len(split) == 4
    for wall, p in split:
        assert sum(sum(parts.values()) for parts in p.parts) == pytest.approx(wall, rel=0.05)
        assert all(value >= 0 for parts in p.parts for value in parts.values())
        assert sum(p.tokens) == pytest.approx(wall, rel=0.05)


def test_profile_leaves_the_model_as_it_was(lm: fusion_model.FusionLM) -> None:
    before = lm.score(SENTENCES[0])
    attributes = set(vars(lm.model)), set(vars(lm.planner)), set(vars(lm.planner.encoder))
    latency.profile(engines.TorchEngine(lm), SENTENCES, runs=1, tokens=3)
    after = set(vars(lm.model)), set(vars(lm.planner)), set(vars(lm.planner.encoder))
    assert attributes == after
    assert lm.score(SENTENCES[0]) == before


def test_every_run_encodes_anew(lm: fusion_model.FusionLM) -> None:
    """Else the second of two equal runs would meet its prefixes in a cache."""
    encoded: list[int] = []
    encode = lm.planner.encoder.encode

    def counted(inputs: Sequence[Any], *args: Any) -> torch.Tensor:
        encoded.append(len(inputs))
        return encode(inputs, *args)

    lm.planner.encoder.encode = counted
    engine = engines.TorchEngine(lm)
    ticks = []
    for _ in range(2):
        engine.generate([SENTENCES[0]], 3, lambda: ticks.append(1))
    assert encoded[: len(encoded) // 2] == encoded[len(encoded) // 2 :]
    assert len(ticks) == 6


def test_summary_of_known_times() -> None:
    def made(seconds: list[float]) -> latency.Pass:
        parts = [{LSTM: s / 2, HOST: s / 2} for s in seconds]
        return latency.Pass(seconds, parts, sum(seconds), 0.0, 5, 10)

    generation = [(made([1.0, 0.1, 0.3, 0.0]), made([2.0, 0.2, 0.6, 0.0]))]
    scoring = [(made([2.0]), made([4.0]))]
    found = latency.summary(latency.Profile(generation, scoring, []), batch=2)
    assert found["generation"]["first_token_ms"]["p50"] == 1000
    assert found["generation"]["token_ms"]["mean"] == 200
    assert found["generation"]["tokens_per_second"] == 10  # two rows at a time
    assert found["generation"]["token_parts_ms"][LSTM] == 200
    assert found["generation"]["parts_over_whole"] == 2
    assert [row["position"] for row in found["generation"]["by_position"]] == [6, 7]
    assert found["scoring"]["word_ms"] == 200
    assert found["scoring"]["word_parts_ms"][HOST] == 200


def test_batch_and_unfused(tmp_path: Path, text_file: Path) -> None:
    path = tmp_path / "p.json"
    small = ["--tokens", 3, "--runs", 2, "--batch", 3, "--prompt-words", 3, "--json", path]
    code, _, _ = run("profile", "fusion-lm-small-unfused", "--text", text_file, *small)
    assert code == 0
    found = json.loads(path.read_text())
    assert found["generation"]["token_parts_ms"][ENCODER] == 0
    assert found["settings"]["batch"] == 3
    assert found["settings"]["backend"] == "auto"


def test_profile_command_writes_everything(tmp_path: Path, text_file: Path) -> None:
    json_file, trace_file = tmp_path / "p.json", tmp_path / "trace.json"
    files = ["--json", json_file, "--trace", trace_file]
    common = ["--text", text_file, "--tokens", 4, "--runs", 2]
    for plot in (tmp_path / "p.svg", tmp_path / "p.png"):
        code, stdout, _ = run("profile", "fusion-lm-small", *common, *files, "--plot", plot)
        assert code == 0
        assert plot.stat().st_size > 1000
    assert "first token, prompt included" in stdout
    found = json.loads(json_file.read_text())
    assert set(found["generation"]["token_parts_ms"]) == set(PARTS)
    assert found["memory"]["process_mb"] > 0
    events = json.loads(trace_file.read_text())["traceEvents"]
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["name"] for e in spans if e["tid"] == 2} == set(PARTS) - {HOST}
    assert all(e["dur"] >= 0 for e in spans)
    tokens = [e for e in spans if e["name"].startswith("token ")]
    assert len(tokens) == 2 * 4
    first, second = tokens[0], tokens[1]
    assert first["ts"] + first["dur"] == pytest.approx(second["ts"], abs=0.01)


def test_prompts_longer_than_all_sentences_are_said(text_file: Path) -> None:
    few = ["--runs", 1, "--tokens", 3, "--prompt-words", 10**6]
    code, _, stderr = run("profile", "fusion-lm-small-unfused", "--text", text_file, *few)
    longest = max(len(line.split()) for line in text_file.read_text().splitlines())
    assert code == 0
    assert f"no sentence has 1000000 words: prompts have {longest}" in stderr


def test_profile_of_an_export(tmp_path: Path, text_file: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from fusion_model.export import export_model

    folder, path = tmp_path / "onnx", tmp_path / "p.json"
    export_model("fusion-lm-small", folder, encoder=True)
    small = ["--tokens", 4, "--runs", 2, "--json", path, "--threads", 1]
    code, stdout, _ = run("profile", "--onnx", folder, "--text", text_file, *small)
    assert code == 0
    assert "an export's step is one graph" in stdout
    found = json.loads(path.read_text())["generation"]
    assert found["token_parts_ms"][ENCODER] > found["token_parts_ms"][VOCABULARY] >= 0
    assert found["token_parts_ms"][LSTM] > 0


def test_a_share_of_a_part_moves_to_another() -> None:
    parts = {LSTM: 2.0, VOCABULARY: 1.0, HOST: 5.0}
    pairs = [(latency.Pass(), latency.Pass(parts=[parts, {HOST: 1.0}]))]
    latency.share_out(pairs, 0.25, LSTM, VOCABULARY)
    assert parts == {LSTM: 1.5, VOCABULARY: 1.5, HOST: 5.0}
    assert pairs[0][1].parts[1] == {LSTM: 0.0, VOCABULARY: 0.0, HOST: 1.0}


def test_profile_mistakes_are_one_line(tmp_path: Path, text_file: Path) -> None:
    word = tmp_path / "word.txt"
    word.write_text("Hello\n")
    assert "1 word: a profile needs" in fails("profile", "fusion-lm-small", "--text", word)
    assert "no-such-model" in fails("profile", "no-such-model", "--text", text_file)
    backend = ("--backend", "cudann")
    assert "unknown backend" in fails("profile", "fusion-lm-small", "--text", text_file, *backend)
    plot = ("--plot", tmp_path / "p.gif")
    assert "end its name in" in fails("profile", "fusion-lm-small", "--text", text_file, *plot)
    assert "--onnx" in fails("profile", "--text", text_file)
    policy = ("--text", text_file, "--policy", "often")
    assert "unknown policy 'often'" in fails("profile", "fusion-lm-small", *policy)
    assert "has no encoding policy" in fails("profile", "fusion-lm-small-unfused", *policy)
    assert "cannot read" in fails("profile", "fusion-lm-small", "--text", tmp_path / "no.txt")


def test_prompts_are_openings_of_the_text() -> None:
    found = latency.prompts_of(["one two three four", "five six", "a b c d e f g h"], 3, 3)
    assert found == ["one two three", "a b c", "one two three"]
    with pytest.raises(FusionLMError, match="2 words"):
        latency.prompts_of(["one two"], 1, 1)


def test_stages_of_an_engine_are_taken_off_when_generation_fails(lm: fusion_model.FusionLM) -> None:
    engine = engines.TorchEngine(lm)

    @contextmanager
    def broken() -> Any:
        with engine.stages(Recorder(Clock())):
            yield

    with pytest.raises(KeyError), broken():
        raise KeyError
    assert "features" not in vars(lm.model)


def test_another_policy_can_be_profiled(text_file: Path, tmp_path: Path) -> None:
    text_file.write_text(" ".join(SENTENCES[:8]))
    code, stdout, _ = run(
        *("profile", "fusion-lm-small", "--text", text_file, "--policy", "incremental"),
        *("--runs", "2", "--tokens", "6", "--json", tmp_path / "found.json"),
    )
    assert code == 0
    assert "encoding policy incremental" in stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["settings"]["policy"] == "incremental"


def test_a_pass_starts_with_no_vectors_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = fusion_model.load("fusion-lm-small", policy="word")
    whole, encoded = HFEncoder._encode_unique, list[int]()

    def counted(self: HFEncoder, inputs: Any) -> Any:
        encoded.append(len(inputs))
        return whole(self, inputs)

    monkeypatch.setattr(HFEncoder, "_encode_unique", counted)
    engine = engines.TorchEngine(lm)
    score = partial(latency._score, engine, ["A cat sat.", "A dog."])
    latency._pair(engine, Recorder(time.perf_counter), score, 0)
    half = len(encoded) // 2
    assert sum(encoded[:half]) == sum(encoded[half:]) > 0
