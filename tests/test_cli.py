"""The command line as a user meets it: results on good input, one clear line on bad."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES
from onnx_cases import saved_model
from typer.testing import CliRunner

import fusion_model
from fusion_model.cli import app
from fusion_model.commands.app import output
from fusion_model.files import write_text

SMALL = ["--vocab-size", "300", "--embedding-size", "8", "--hidden-size", "12", "--split", "lines"]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def fails(*arguments: object) -> str:
    """The one line that a mistake gives."""
    code, _, stderr = run(*arguments)
    lines = [line for line in stderr.splitlines() if line]
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def unsealed(path: Path) -> dict[str, Any]:
    """A file of JSON as if it had no checksum, such as one written by an earlier version."""
    contents = json.loads(path.read_text())
    del contents["checksum"]
    return contents


def test_train_then_everything_else(text_file: Path, bert_folder: Path, tmp_path: Path) -> None:
    out, store = tmp_path / "model", tmp_path / "store"
    files = ["--train-file", text_file, "--dev-file", text_file]
    encoder = ["--encoder", bert_folder, "--pooling", "mean"]
    small_store = ["--text", text_file, "--out", store, "--split", "lines", "--vocab-size", "300"]
    code, stdout, _ = run("embed", *small_store, *encoder)
    assert code == 0
    assert re.search(r"\d+ vectors for \d+ positions", stdout)
    size = (store / "vectors.bin").stat().st_size
    code, stdout, stderr = run(
        "train", *files, *encoder, *SMALL, "--epochs", "2", "--out", out, "--store", store
    )
    assert code == 0
    assert "dev perplexity" in stdout
    assert "epoch   2" in stderr
    assert (store / "vectors.bin").stat().st_size == size  # embed had made them all
    tsv = tmp_path / "scores.tsv"
    code, _, _ = run("score", out, "--text", text_file, "--split", "lines", "--out", tsv)
    assert code == 0
    rows = [line.split("\t") for line in tsv.read_text().splitlines()]
    assert rows[0][:7] == ["document", "sentence", "word", "text", "bits", "nats", "tokens"]
    assert [r[3] for r in rows[1:] if r[1] == "1"] == [*SENTENCES[0].split(), "</s>"]
    nats, tokens = sum(float(r[5]) for r in rows[1:]), sum(int(r[6]) for r in rows[1:])
    code, stdout, _ = run(
        "evaluate", out, "--text", text_file, "--split", "lines", "--store", store
    )
    assert code == 0
    measured = dict(re.findall(r"│ (.+?) +│ +([\d,.]+) │", stdout))
    assert float(measured["nats per token"]) == pytest.approx(nats / tokens, abs=1e-3)
    assert float(measured["2**nats (what the paper calls perplexity)"]) == pytest.approx(
        2 ** (nats / tokens), rel=1e-3
    )
    code, stdout, _ = run("evaluate", out, "--text", text_file, "--split", "lines", "--json")
    found = json.loads(stdout)
    assert found["nats_per_token"] == pytest.approx(nats / tokens, abs=1e-5)
    assert found["tokens"] == tokens
    shown = float(measured["perplexity per token"])
    assert found["perplexity"] == pytest.approx(shown, rel=1e-4)
    for options in (["--seed", "1"], ["--temperature", "0"], ["--beam", "3"]):
        code, stdout, _ = run(
            "generate", out, "--prompt", "The cat", "--max-new-tokens", 5, *options
        )
        assert code == 0
        assert stdout.startswith("The cat")


def test_embed_for_a_model_serves_its_evaluation(
    trained: Path, tmp_path: Path, bert_folder
) -> None:
    text, store = trained / "text.txt", tmp_path / "store"
    arguments = ["--text", text, "--split", "lines", "--model", trained / "concat"]
    run("embed", *arguments, "--out", store)
    size = (store / "vectors.bin").stat().st_size
    assert size > 0
    code, _, _ = run(
        "evaluate", trained / "concat", "--text", text, "--split", "lines", "--store", store
    )
    assert code == 0
    assert (store / "vectors.bin").stat().st_size == size


def test_a_model_settles_what_is_embedded_for_it(
    trained: Path, bpe, bert_folder: Path, encoder_folders: dict[str, Path], tmp_path: Path
) -> None:
    options = {"view": "previous", "pooling": "cls", "fusion": "add"}
    model, store = saved_model(tmp_path / "m", bpe, bert_folder, **options), tmp_path / "store"
    text = ["--text", trained / "text.txt", "--split", "lines"]
    run("embed", *text, "--model", model, "--out", store)
    assert json.loads((store / "manifest.json").read_text())["view"] == "previous"
    size = (store / "vectors.bin").stat().st_size
    assert run("evaluate", model, *text, "--store", store)[0] == 0
    assert (store / "vectors.bin").stat().st_size == size
    embed = ["embed", *text, "--out", tmp_path / "other"]
    for option in (["--view", "masked"], ["--pooling", "mean"], ["--vocab-size", 300]):
        settled = f"{option[0]} does not go with --model"
        assert settled in fails(*embed, "--model", model, *option)
    other = ["--encoder", encoder_folders["roberta"]]
    assert "another encoder" in fails(*embed, "--model", model, *other)
    assert "has no prefix embeddings" in fails(*embed, "--model", trained / "none")
    assert "name an --encoder" in fails(*embed)
    assert "unknown vocabulary 'words'" in fails(*embed, *other, "--vocabulary", "words")


@pytest.mark.parametrize("command", ["evaluate", "score", "train", "embed"])
def test_bad_text_files(command: str, trained: Path, tmp_path: Path) -> None:
    bad = {
        "empty.txt": (b"", "is empty"),
        "binary.txt": (b"\x7fELF\0\0", "is a binary file"),
        "latin.txt": ("naïve".encode("latin1"), "is not UTF-8"),
    }
    for name, (content, message) in bad.items():
        path = tmp_path / name
        path.write_bytes(content)
        arguments = {
            "evaluate": [trained / "none", "--text", path],
            "score": [trained / "none", "--text", path],
            "train": ["--train-file", path, "--dev-file", path, "--out", tmp_path / "o"],
            "embed": ["--text", path, "--encoder", "zeros", "--out", tmp_path / "o"],
        }[command]
        line = fails(command, *arguments)
        assert message in line
        assert name in line


def test_bad_models(trained: Path, tmp_path: Path, bert_folder: Path) -> None:
    text = trained / "text.txt"

    def attempt(model: object, *more: object) -> str:
        return fails("score", model, "--text", text, *more)

    assert "no such folder" in attempt(tmp_path / "nowhere")
    assert "one that ships (fusion-lm-small, fusion-lm-small-unfused)" in attempt("fusion-lm-smal")
    (tmp_path / "empty").mkdir()
    assert "holds no model.safetensors" in attempt(tmp_path / "empty")
    pickled = tmp_path / "pickled"
    shutil.copytree(trained / "none", pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert "pickled weights" in attempt(pickled)
    damaged = tmp_path / "damaged"
    shutil.copytree(trained / "none", damaged)
    data = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "model.safetensors is damaged: its sha256 differs" in attempt(damaged)
    (damaged / "sha256.json").unlink()
    assert "a damaged file" in attempt(damaged)
    assert "is a bert model, not a fusion-lm one" in attempt(bert_folder)
    (damaged / "config.json").write_text("{")
    assert "damaged" in attempt(damaged)
    assert "unknown backend 'cuda'" in attempt(trained / "none", "--backend", "cuda")
    assert "device 'cuda:7' cannot be used" in attempt(trained / "none", "--device", "cuda:7")


def test_lacking_weights_are_not_made_up(trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "lacking"
    shutil.copytree(trained / "none", folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "sha256.json").unlink()
    line = fails("score", folder, "--text", trained / "text.txt")
    assert "lacks weights (lm_head.bias)" in line


def test_another_encoder_is_refused(
    trained: Path, encoder_folders: dict[str, Path], tmp_path: Path
) -> None:
    text, model = trained / "text.txt", trained / "concat"
    line = fails("score", model, "--text", text, "--encoder", encoder_folders["roberta"])
    assert "was trained with another encoder" in line
    store = tmp_path / "store"
    other = ["--encoder", encoder_folders["roberta"], "--pooling", "mean"]
    run("embed", "--text", text, *other, "--out", store)
    line = fails("evaluate", model, "--text", text, "--store", store)
    assert "has fingerprint" in line
    assert "name another store" in line


def test_a_sentence_of_any_length_is_scored(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("cat " * 100)
    for model in ("none", "concat"):
        code, stdout, _ = run("score", trained / model, "--text", path)
        assert code == 0
        assert len(stdout.splitlines()) == 102


def test_unknown_choices_are_named(text_file: Path, trained: Path, tmp_path: Path) -> None:
    files = ["--train-file", text_file, "--dev-file", text_file, "--out", tmp_path / "o"]
    assert "unknown fusion 'sum': choose one of none" in fails("train", *files, "--fusion", "sum")
    assert "or take auto" in fails("train", *files, "--pooling", "max")
    assert "unknown context" in fails(
        "score", trained / "none", "--text", text_file, "--context", "book"
    )
    code, _, stderr = run("train", "--train-file", text_file)
    assert code == 2
    assert "Missing option '--" in stderr


def test_default_readers_take_the_whole_table(trained: Path, tmp_path: Path) -> None:
    """Words with quotes, of separators' names and of missing values; offsets lead to the text."""
    import csv

    import pandas

    text = '"Where is\tit?" he said.\r\n\r\nNA   null #5 don\'t " 5" ""x"" nan  ‘quoted’ é end"\n'
    source, out = tmp_path / "odd\tname.txt", tmp_path / "s.tsv"
    source.write_bytes(text.encode())
    assert run("score", trained / "none", "--text", source, "--out", out)[0] == 0
    table = pandas.read_csv(out, sep="\t", keep_default_na=False)
    words = table[table.text != "</s>"]
    assert list(words.text) == text.split()
    assert set(table.document) == {str(source)}
    assert [text[a:b] for a, b in zip(words.start, words.end, strict=True)] == text.split()
    assert not table.unknown.any()
    assert len(pandas.read_csv(out, sep="\t")) == len(table)  # NA and null are missing, no more
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert [row[3] for row in rows[1:]] == list(table.text)


def test_output_appears_whole_or_not_at_all(trained: Path, tmp_path: Path, monkeypatch) -> None:
    from fusion_model import surprisal as words

    def full(self) -> float:
        raise OSError(28, "No space left on device", "scores.tsv")

    out = tmp_path / "scores.tsv"
    monkeypatch.setattr(words.WordScore, "bits", property(full))
    line = fails("score", trained / "none", "--text", trained / "text.txt", "--out", out)
    assert "the disk is full" in line
    assert list(tmp_path.iterdir()) == []
    missing = tmp_path / "no" / "scores.tsv"
    line = fails("score", trained / "none", "--text", trained / "text.txt", "--out", missing)
    assert f"No such file or directory: {missing}" in line


def test_ctrl_c_in_training_keeps_the_work(
    text_file: Path, bert_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fusion_model.cli", "train", "--train-file", text_file]
    command += [
        "--dev-file",
        text_file,
        *SMALL,
        "--epochs",
        "5000",
        "--patience",
        "0",
        "--out",
        out,
    ]
    command += ["--encoder", bert_folder, "--pooling", "mean"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [str(c) for c in command], stderr=subprocess.PIPE, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.splitlines()[-1].startswith("error: interrupted; what was finished is kept")
    assert "Traceback" not in stderr
    assert len(list(out.glob("checkpoint-*"))) == 1
    code, _, _ = run("score", out, "--text", text_file)
    assert code == 0


def test_help_lists_the_commands() -> None:
    code, stdout, _ = run("--help")
    assert code == 0
    for name in ("demo", "train", "evaluate", "score", "generate", "embed"):
        assert name in stdout
    _, stdout, _ = run("train", "--help")
    assert "--prefix-dropout-schedule" in stdout


def test_devices_pipes_and_links_are_written_through(tmp_path: Path) -> None:
    """A file that is whole or absent, but never in the place of something else."""
    link, pipe = tmp_path / "link.tsv", tmp_path / "pipe"
    (tmp_path / "real.tsv").write_text("old")
    link.symlink_to(tmp_path / "real.tsv")
    write_text(link, "new")
    assert link.is_symlink()
    assert (tmp_path / "real.tsv").read_text() == "new"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        with output(pipe) as file:
            file.write("through")
        assert read.result(10) == "through"
    assert pipe.is_fifo()
    with output(Path(os.devnull)) as file:
        file.write("gone")
    assert Path(os.devnull).is_char_device()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.tsv", "pipe", "real.tsv"]


def test_version_and_module() -> None:
    shown = f"fusion-lm {fusion_model.__version__}\n"
    assert run("--version") == (0, shown, "")
    command = [sys.executable, "-m", "fusion_model", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == shown


@pytest.mark.parametrize("asked", [None, "2"])
def test_tokens_are_made_on_one_thread(asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine threads wait for each other; who names a number gets it."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    seen, generate = [], fusion_model.FusionLM.generate

    def spied(self, *args, **options):
        seen.append(torch.get_num_threads())
        return generate(self, *args, **options)

    monkeypatch.setattr(fusion_model.FusionLM, "generate", spied)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert (
            run("generate", "fusion-lm-small-unfused", "--max-new-tokens", 2, "--seed", 1)[0] == 0
        )
        assert (seen, torch.get_num_threads()) == ([2 if asked else 1], 2)
    finally:
        torch.set_num_threads(before)
