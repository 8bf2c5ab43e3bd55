"""An export needs neither PyTorch nor transformers: text to surprisal in an environment without."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SENTENCES
from fusion_model.export import export_model
from onnx_cases import one_thread as one_thread
from onnx_cases import saved_model

import fusion_model
from fusion_model.data.text import read_documents

ROOT = Path(__file__).parents[1]
LIGHT = ["onnxruntime", "tokenizers", "numpy", "sentencex", "typer", "rich"]
HEAVY = ["torch", "transformers", "sklearn", "datasets", "onnx", "safetensors"]
HEAVY += ["psutil", "matplotlib"]
LINES = 60  # of WikiText-2: some 3,000 words
WITHOUT = f"""
import sys
for name in {HEAVY}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
from fusion_model.cli import main
main()
"""


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, bpe, bert_folder: Path) -> Path:
    folder = saved_model(tmp_path_factory.mktemp("model"), bpe, bert_folder, fusion="concat")
    export_model(str(folder), folder / "onnx", encoder=True)
    return folder / "onnx"


def expected(export: Path, text: Path) -> list[tuple[str, float]]:
    words = fusion_model.load(str(export.parent)).score(text.read_text())
    return [(word.text, word.bits) for word in words]


def said(command: list[str], *arguments: object) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def scores(command: list[str], export: Path, text: Path, out: Path) -> list[tuple[str, float]]:
    said(command, "score", "--onnx", export, "--text", text, "--out", out, "--threads", 1)
    rows = list(csv.reader(out.read_text().splitlines(), delimiter="\t"))
    assert rows[0][3:5] == ["text", "bits"]
    return [(row[3], float(row[4])) for row in rows[1:]]


def profiled(command: list[str], export: Path, text: Path, out: Path) -> None:
    """Every stage has its time, and the machine is described."""
    few = ("--runs", 2, "--tokens", 3, "--threads", 1, "--json", out)
    shown = said(command, "profile", "--onnx", export, "--text", text, *few)
    assert "tells the vocabulary's share" in shown
    found = json.loads(out.read_text())
    for parts in (found["generation"]["token_parts_ms"], found["scoring"]["word_parts_ms"]):
        assert min(parts[name] for name in ("prefix encoding", "vocabulary and sampling")) > 0
        # Of so small a model all nodes but the vocabulary's may take 0 whole microseconds.
        assert parts["LSTM and fusion"] >= 0
    spread = found["generation"]["token_ms"]
    assert 0 < spread["p50"] <= spread["p90"] <= spread["p99"]
    assert found["machine"]["threads"] == 1
    assert "onnxruntime" in found["title"]


def agree(found: list[tuple[str, float]], wanted: list[tuple[str, float]]) -> None:
    assert [word for word, _ in found] == [word for word, _ in wanted]
    assert [bits for _, bits in found] == pytest.approx([bits for _, bits in wanted], abs=1e-4)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(SENTENCES[:6]))
    return path


def test_score_imports_nothing_heavy(export: Path, text: Path, tmp_path: Path) -> None:
    found = scores([sys.executable, "-c", WITHOUT], export, text, tmp_path / "out.tsv")
    agree(found, expected(export, text))


def test_profile_imports_nothing_heavy(export: Path, text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT]
    profiled(command, export, text, tmp_path / "p.json")
    plot = ("--plot", tmp_path / "p.svg")
    done = subprocess.run(
        [*command, "profile", "--onnx", export, "--text", text, *plot],
        capture_output=True,
        text=True,
    )
    assert done.stderr.startswith("error: --plot needs matplotlib: pip install matplotlib")
    assert len(done.stderr.splitlines()) == 1


def test_generate_imports_nothing_heavy(export: Path) -> None:
    options = ["--onnx", str(export), "--prompt", "The cat", "--temperature", "0"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "generate", *options, "--max-new-tokens", "5"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lm = fusion_model.load(str(export.parent))
    assert done.stdout == lm.generate("The cat", max_new_tokens=5)[0] + "\n"


def test_what_needs_pytorch_says_so_in_one_line(text: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "evaluate", "some-model", "--text", str(text)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: this needs t")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_export_names_the_extra_that_is_missing(
    missing: str, bpe, bert_folder: Path, tmp_path: Path
) -> None:
    """Of an encoder that PyTorch's exporter traces: pooling `mask` of exact texts."""
    options = {"fusion": "concat", "pooling": "mask"}
    folder = saved_model(tmp_path / "model", bpe, bert_folder, **options)
    code = f"import sys; sys.modules[{missing!r}] = None; from fusion_model.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "export", folder, tmp_path / "out", "--encoder"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"error: this needs {missing}")
    assert 'pip install -e ".[onnx]" -c constraints.txt' in last
    assert "Traceback" not in done.stderr


def test_names_are_lazy_and_the_auto_classes_know_the_model() -> None:
    code = (
        "import fusion_model; from transformers import AutoConfig; "
        "assert AutoConfig.for_model('fusion_lm').__class__ is fusion_model.FusionLMConfig; "
        "assert set(fusion_model.__all__) <= {n for n in fusion_model.__all__ "
        "if getattr(fusion_model, n) is not None}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fusion_model.nothing


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """`fusion-lm` in an environment of its own, with ONNX Runtime alone."""
    venv = tmp_path_factory.mktemp("light") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python = str(venv / "bin" / "python")
    for what in (LIGHT, ["--no-deps", str(ROOT)]):
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", *what], capture_output=True, text=True
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            pytest.skip(f"pip cannot install {' '.join(what)}: {reason}")
    for name in HEAVY:
        there = subprocess.run([python, "-c", f"import {name}"], capture_output=True, cwd="/")
        assert there.returncode, f"{name} is in the environment: the test shows nothing"
    return [str(venv / "bin" / "fusion-lm")]


def held_to_pytorch(
    command: list[str], export: Path, model: str, text: Path, tolerance: float
) -> None:
    """`evaluate`: as many words and tokens, and about the perplexity."""
    wanted = fusion_model.load(model).perplexity(read_documents([str(text)]))
    found = json.loads(said(command, "evaluate", "--onnx", export, "--text", text, "--json"))
    assert (found["words"], found["tokens"]) == (wanted.words, wanted.tokens)
    assert found["perplexity"] == pytest.approx(wanted.perplexity, rel=tolerance)
    print(f"{model}: {wanted.words} words, perplexity {wanted.perplexity} {found['perplexity']}")


@pytest.mark.slow
def test_an_environment_with_onnxruntime_alone(
    light: list[str], export: Path, text: Path, tmp_path: Path
) -> None:
    agree(scores(light, export, text, tmp_path / "out.tsv"), expected(export, text))
    profiled(light, export, text, tmp_path / "p.json")
    held_to_pytorch(light, export, str(export.parent), text, 1e-5)
    assert said(light, "generate", "--onnx", export, "--prompt", "The cat").startswith("The cat")


@pytest.mark.slow
def test_the_shipped_model_in_int8_without_pytorch(
    light: list[str], shared_data: Path, tmp_path: Path
) -> None:
    """Incremental, on the beginning of WikiText-2's test text."""
    export, text, name = tmp_path / "onnx", tmp_path / "text.txt", "fusion-lm-small"
    lines = (shared_data / "wikitext-2" / "test.txt").read_text().splitlines()
    text.write_text("\n".join(lines[:LINES]) + "\n")
    manifest = export_model(name, export, encoder=True, precision="int8")
    assert (manifest["precision"], manifest["encoder"]["policy"]) == ("int8", "incremental")
    words = scores(light, export, text, tmp_path / "out.tsv")
    wanted = fusion_model.load(name).score(read_documents([str(text)]))
    assert [word for word, _ in words] == [word.text for word in wanted]
    held_to_pytorch(light, export, name, text, 0.005)
    profiled(light, export, text, tmp_path / "p.json")
    assert said(light, "generate", "--onnx", export, "--prompt", "The old").startswith("The old")
