"""`fusion-lm experiment` as a user runs it: killed and run again, on datasets, with mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SENTENCES
from typer.testing import CliRunner

from fusion_model.cli import app
from fusion_model.experiments import sizes
from fusion_model.experiments.sizes import Size

# The command itself, with one more size: `small` would take minutes. Asked to, it waits after the
# third epoch of a run until it is stopped: alone it would be through before a busy test looks.
COMMAND = """
import os, time
from fusion_model.experiments import sizes
from fusion_model.training.run import TrainingRun

end_epoch = TrainingRun._end_epoch

def end_and_wait(self):
    end_epoch(self)
    runs = len(list((self.out.parents[1] / "results").glob("*.json"))) + 1
    waits = self.state.epoch >= 3 and os.environ.get("WAIT_IN") == str(runs)
    while waits and not self.stop.requested:
        time.sleep(0.01)

TrainingRun._end_epoch = end_and_wait
sizes.SIZES["toy"] = sizes.Size(
    "toy", 16, 4, 6,
    {"vocab_size": 300, "embedding_size": 6, "hidden_size": 8, "max_tokens": 40, "epochs": 30,
     "patience": 0, "tokens_per_batch": 64},
    learning_rates=(0.01,), prefix_dropouts=(0.5,), dropouts=(0.1,), data_sizes={16: 30},
)
from fusion_model.cli import app
app()
"""


def write_corpora(folder: Path) -> Path:
    for corpus in ("brown", "letters"):
        (folder / corpus).mkdir(parents=True)
        for name in "abc":
            (folder / corpus / f"{name}.txt").write_text("\n".join(SENTENCES) + "\n")
    return folder


def start(
    name: str, data: Path, out: Path, encoder: Path, wait_in: int = 0
) -> "subprocess.Popen[str]":
    arguments = ["experiment", name, "--size", "toy", "--data", str(data), "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments, "--seeds", "1", "--encoder", str(encoder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "WAIT_IN": str(wait_in)},
    )


def finished(out: Path) -> dict[str, int]:
    """When the file of each finished run was begun to be; scored, it is written again."""
    return {path.stem: path.stat().st_mtime_ns for path in out.glob("results/*.json")}


def wait_until_in_the_middle(out: Path, number: int, process: "subprocess.Popen[str]") -> Path:
    """Until the run of this number has some epochs behind it, of 30; its folder."""
    until = time.monotonic() + 600
    while time.monotonic() < until:
        assert process.poll() is None, process.communicate()[1]
        done = finished(out)
        for metrics in out.glob("runs/*/metrics.jsonl"):
            going = len(done) == number - 1 and metrics.parent.name not in done
            if going and len(metrics.read_text().splitlines()) >= 3:
                return metrics.parent
        time.sleep(0.05)
    raise AssertionError("the run did not come so far")


def results(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in out.glob("results/*.json")}


@pytest.mark.parametrize(
    "how",
    [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=lambda s: s.name,
)
def test_killed_command_goes_on_where_it_was(
    how: signal.Signals, tmp_path: Path, bert_folder: Path
) -> None:
    data, whole, halves = write_corpora(tmp_path / "data"), tmp_path / "whole", tmp_path / "halves"
    process = start("domain", data, halves, bert_folder, wait_in=5)
    begun = wait_until_in_the_middle(halves, 5, process)
    process.send_signal(how)
    out, err = process.communicate(timeout=300)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert not (halves / "domain").exists()
    if how == signal.SIGINT:
        kept = "what was finished is kept, run the same command to go on"
        assert err.splitlines()[-1] == f"error: interrupted; {kept}"
    done = finished(halves)
    assert len(done) == 4  # two that count, two trained
    epochs = len((begun / "metrics.jsonl").read_text().splitlines())
    assert 3 <= epochs < 30

    again = start("domain", data, halves, bert_folder)
    out, err = again.communicate(timeout=900)
    assert again.returncode == 0, err
    assert out.strip() == str(halves / "domain" / "report.md")
    assert done.items() <= finished(halves).items()  # not trained again
    third, fourth = err.split("run 6:")
    repeated = [n for n in range(1, 31) if f"epoch {n:>3}  train" in third]
    # Killed between an epoch's metrics and its checkpoint, it repeats that epoch.
    assert repeated == list(range(repeated[0], 31))
    assert repeated[0] >= epochs
    assert "epoch   1  train" in fourth

    straight = start("domain", data, whole, bert_folder)
    assert straight.wait(timeout=900) == 0
    assert results(whole) == results(halves)
    assert (whole / "domain/report.md").read_text() == (halves / "domain/report.md").read_text()


TINY = Size(
    "tiny",
    16,
    4,
    6,
    {"vocab_size": 300, "embedding_size": 6, "hidden_size": 8, "max_tokens": 40, "epochs": 1},
    data_sizes={8: 1, 16: 1},
)


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["experiment", *map(str, arguments), "--size", "tiny"])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sizes.SIZES, "tiny", TINY)


@pytest.mark.usefixtures("tiny")
def test_dataset_folder_as_data(tmp_path: Path, bert_folder: Path) -> None:
    """`hf:` and a folder: what `datasets` reads there, JSON lines here, is a corpus."""
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [json.dumps({"text": sentence}) for sentence in SENTENCES * 2]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    code, stdout, stderr = run(
        "schedule", "--data", f"hf:{folder}", "--out", out, "--seeds", 1, "--encoder", bert_folder
    )
    assert code == 0, stderr
    assert f"test sentences, hf:{folder};" in Path(stdout.strip()).read_text()
    [train] = (out / "texts").glob("*-train-*")
    written = [s for file in train.glob("*.txt") for s in file.read_text().splitlines()]
    assert len(written) == 16
    assert set(written) <= set(SENTENCES)
    code, _, stderr = run("schedule", "--data", f"hf:{tmp_path / 'none'}", "--out", tmp_path / "o")
    assert code == 1
    assert stderr.splitlines()[-1].startswith("error: cannot load the dataset")


@pytest.mark.usefixtures("tiny")
def test_folder_of_other_settings_is_left_alone(tmp_path: Path, bert_folder: Path) -> None:
    data, out = write_corpora(tmp_path / "data"), tmp_path / "out"
    arguments = ["schedule", "--data", data, "--out", out, "--seeds", 1]
    assert run(*arguments, "--encoder", bert_folder)[0] == 0
    report = (out / "schedule" / "report.md").read_bytes()
    for changed in (["--encoder", "minilm"], ["--encoder", bert_folder, "--corpus", "letters"]):
        code, _, stderr = run(*arguments, *changed)
        assert (code, len(stderr.splitlines())) == (1, 1)
        assert f'"encoder": "{bert_folder}", "corpus": null' in stderr
    assert (out / "schedule" / "report.md").read_bytes() == report


@pytest.mark.usefixtures("tiny")
def test_users_reading_times_as_tsv(tmp_path: Path, bert_folder: Path) -> None:
    """Another corpus: one alignment, since nobody says that its times are shifted."""
    data, table = write_corpora(tmp_path / "data"), tmp_path / "mine.tsv"
    generator = np.random.default_rng(0)
    rows = ["story\tword\ttime"]
    for story in ("one", "two", "three"):
        for word in " ".join(SENTENCES[:8]).split():
            rows.append(f"{story}\t{word}\t{300 + 10 * generator.standard_normal():.1f}")
    table.write_text("\n".join(rows) + "\n")
    out = tmp_path / "out"
    code, stdout, stderr = run(
        *("reading-times", "--data", data, "--reading-times", table, "--out", out),
        *("--seeds", 2, "--encoder", bert_folder),
    )
    assert code == 0, stderr
    saved = json.loads(Path(stdout.strip()).with_name("results.json").read_text())
    assert saved["setting"].startswith(f"mine: {len(rows) - 1} words in 3 stories")
    models = {(m["arm"], m["size"]) for m in saved["data"]["models"]}
    assert {("unfused", "8"), ("fused", "16"), ("exact mean", "16")} < models
    assert saved["data"]["verdicts"].keys() == {"stored", "stored, log"}
    table.write_text("story\tword\nA\tb\n")
    code, _, stderr = run("reading-times", "--reading-times", table, "--out", tmp_path / "o")
    assert (code, len(stderr.splitlines())) == (1, 1)
    assert "lacks the column time" in stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fusion", "--seeds", "two"], "Invalid value for '--seeds'"),
        (["fusion", "--seeds", "-1"], "seeds must be at least 1"),
        (["fusion", "--data", "DATA", "--encoder", "nowhere/at/all"], "nowhere/at/all"),
        (["fusion", "--data", "EMPTY"], "holds no .txt file"),
        (["fusion", "--data", "LATIN"], "is not UTF-8"),
        (["examples", "--model", "nowhere", "--model", "fusion-lm-small"], "nowhere"),
        (["fusion", "--data", "DATA", "--out", "FILE"], "FILE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_a_line(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sizes.SIZES, "small", TINY)
    monkeypatch.chdir(tmp_path)
    write_corpora(tmp_path / "DATA")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "LATIN").mkdir()
    (tmp_path / "LATIN" / "a.txt").write_bytes("Ein Stück.\n".encode("latin1"))
    (tmp_path / "FILE").write_text("")
    out = [] if "--out" in arguments else ["--out", "out"]
    result = CliRunner().invoke(app, ["experiment", *arguments, *out])
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr
