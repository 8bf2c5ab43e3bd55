"""What goes wrong ends in one line, and nothing wrong passes in silence."""

import csv
import io
import json
import math
import os
import random
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from safetensors.torch import load_file, save_file
from test_cli import SMALL, fails, run
from test_training import metrics

import fusion_model
from fusion_model.data.text import Document
from fusion_model.data.tokenizer import cut_vocabulary
from fusion_model.encoders import load_encoder
from fusion_model.errors import CheckpointError, FusionLMError, TooLong
from fusion_model.files import locked
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.prefixes.stream import PrefixStream
from fusion_model.schema import Range, read_json, write_json
from fusion_model.training import run as training
from fusion_model.training.options import TrainingOptions
from fusion_model.training.run import train


def copied(source: Path, to: Path, sealed: bool = True) -> Path:
    """A model of one's own; without `sealed` as if saved by transformers."""
    shutil.copytree(source, to)
    if not sealed:
        (to / "sha256.json").unlink()
    return to


# --- models


def damage_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "12"}, "hidden_size must be of type int"),
        ({"hidden_size": 10**8}, "damaged file"),
        ({"num_layers": 10**9}, "num_layers must be at least 1 and at most 64"),
        ({"dropout": 2.0}, "dropout must be from 0 to 1"),
        ({"pooling": None}, "pooling must be of type str"),
        ({"vocab_size": 299}, "damaged file"),
        ({"eos_token_id": 5}, "its eos_token_id is 2, the model's 5"),
    ],
)
def test_a_damaged_configuration_is_named(
    change: dict[str, Any],
    message: str,
    trained: Path,
    tmp_path: Path,
) -> None:
    folder = copied(trained / "none", tmp_path / "m", sealed=False)
    damage_config(folder, **change)
    assert message in fails("score", folder, "--text", trained / "text.txt")


def test_weights_that_are_not_finite_are_refused(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained / "none", tmp_path / "m", sealed=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.bias"][3] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for command in ("evaluate", "score"):
        line = fails(command, folder, "--text", trained / "text.txt")
        assert "holds NaN or infinity in its weights (lm_head.bias)" in line
    assert "holds NaN" in fails("generate", folder)
    assert "holds NaN" in fails("export", folder, tmp_path / "onnx")


def test_tokenizers_that_are_not_the_models_are_refused(
    trained: Path,
    tmp_path: Path,
    bert_folder: Path,
) -> None:
    text = trained / "text.txt"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        folder = copied(trained / "none", tmp_path / name, sealed=False)
        shutil.copy(bert_folder / name, folder / name)
        assert "tokenizer" in fails("score", folder, "--text", text)
        (folder / name).unlink()
        assert "tokenizer" in fails("score", folder, "--text", text)
        sealed = copied(trained / "none", tmp_path / f"sealed-{name}")
        shutil.copy(bert_folder / name, sealed / name)
        assert f"{name} is damaged" in fails("score", sealed, "--text", text)


def test_files_of_a_model_can_be_read_by_others(trained: Path, tmp_path: Path) -> None:
    umask = os.umask(0o022)
    os.umask(umask)
    [checkpoint] = (trained / "none").glob("checkpoint-*")
    for folder in (trained / "none", checkpoint):
        mode = stat.S_IMODE((folder / "model.safetensors").stat().st_mode)
        assert mode == 0o666 & ~umask
    folder = copied(trained / "none", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()  # as root, nothing else cannot be read
    line = fails("score", folder, "--text", trained / "text.txt")
    assert f"cannot read {folder / 'model.safetensors'}: Is a directory" in line


# --- what JSON says


def test_a_folder_of_ones_own_comes_before_a_model_that_ships(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(trained / "none", tmp_path / "fusion-lm-small")
    monkeypatch.chdir(tmp_path)
    for name in ("fusion-lm-small", "./fusion-lm-small"):
        assert fusion_model.load(name).model.config.hidden_size == 12
    monkeypatch.chdir("fusion-lm-small")
    assert fusion_model.load(".").model.config.hidden_size == 12
    with pytest.raises(CheckpointError, match="there is no model ''"):
        fusion_model.load("")
    assert fusion_model.load("fusion-lm-small").model.config.hidden_size == 384
    with pytest.raises(FusionLMError, match="device 'cuda:9' cannot be used"):
        fusion_model.load(".", device="cuda:9")


@pytest.mark.parametrize("fusion", ["none", "concat"])
def test_a_model_can_be_saved_where_it_lies(fusion: str, trained: Path, tmp_path: Path) -> None:
    folder = copied(trained / fusion, tmp_path / "own")
    lm = fusion_model.load(str(folder))
    with torch.no_grad():
        lm.model.lm_head.bias += 1
        lm.model.lm_head.bias[5] += 3
    lm.save_pretrained(folder)
    assert (folder / "README.md").exists()
    again = fusion_model.load(str(folder))
    assert again.score("A cat.") == lm.score("A cat.")
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=r"config.json is damaged"):
        fusion_model.load(str(folder))


def test_scores_and_greedy_text_have_no_dropout(trained: Path) -> None:
    lm = fusion_model.load(str(trained / "concat"))
    lm.model.config.dropout = 0.9
    scores, text = lm.score("A cat sat."), lm.generate("A", max_new_tokens=5, do_sample=False)
    lm.model.train()
    assert lm.score("A cat sat.") == scores
    lm.model.train()
    assert lm.generate("A", max_new_tokens=5, do_sample=False) == text


def test_json_is_held_to_its_type_and_to_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, 2], "é": None})
    assert read_json(path, dict[str, Any]) == {"a": [1, 2], "é": None}
    path.write_text(path.read_text().replace("2", "3", 1))
    with pytest.raises(ValueError, match="its checksum differs"):
        read_json(path, dict[str, Any])
    for text, kind, message in (
        ("[1]", dict[str, int], "a must be of type dict"),
        ('{"k": true}', dict[str, int], r"a\.k must be of type int"),
        ("[1, 2]", tuple[int, int, int], "a must have 3 entries"),
        ('[1, "x"]', list[int], r"a\[1\] must be of type int"),
        ("[" * 100_000, list[Any], "nested too deeply"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_json(path, kind)


@pytest.mark.parametrize(
    ("limits", "inside", "outside", "text"),
    [
        (Range(1), 1, 0, "at least 1"),
        (Range(0, 1), 1.0, 1.1, "from 0 to 1"),
        (Range(0, 1, "[)"), 0.0, 1.0, "at least 0 and below 1"),
        (Range(0, math.inf, "()"), 1e9, math.inf, "above 0 and finite"),
        (Range(0, math.inf, "()"), 1e-9, math.nan, "above 0 and finite"),
    ],
)
def test_ranges(limits: Range, inside: float, outside: float, text: str) -> None:
    assert inside in limits
    assert outside not in limits
    assert str(limits) == text


# --- options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**40}, "seed must be from 0"),
        ({"learning_rate": math.nan}, "learning rate must be above 0 and finite"),
        ({"learning_rate": math.inf}, "learning rate must be above 0 and finite"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"patience": -1}, "patience must be at least 0"),
        ({"max_grad_norm": 0.0}, "max grad norm must be above 0"),
        ({"max_tokens": 0}, "max tokens must be at least 1"),
        ({"hidden_size": "12"}, "hidden size must be of type int"),
        ({"num_layers": 65}, "num layers must be at least 1 and at most 64"),
    ],
)
def test_options_out_of_range_are_named(
    change: dict[str, Any],
    message: str,
    options,
) -> None:
    with pytest.raises(FusionLMError, match=message):
        options(**change)


@pytest.mark.parametrize("change", [{"hidden_size": 10**8}, {"vocab_size": 10**9}])
def test_a_model_that_memory_cannot_hold_is_refused_first(
    change: dict[str, int],
    options,
    tmp_path: Path,
) -> None:
    with pytest.raises(FusionLMError, match=r"training a model of this size takes .* GiB"):
        train(options(**change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_has_an_end(text_file: Path, tmp_path: Path) -> None:
    from fusion_model.data.tokenizer import train_bpe

    with pytest.raises(FusionLMError, match="at most 16,777,216 tokens"):
        train_bpe(SENTENCES, 10**9)


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "--onnx", "OUT", "--text", "TEXT", "--threads", "100000"],
        ["generate", "MODEL", "--seed", "-1"],
        ["generate", "MODEL", "--seed", str(2**40)],
        ["generate", "MODEL", "--temperature", "nan"],
    ],
    ids=lambda a: " ".join(a[-2:]),
)
def test_numbers_out_of_range_are_refused(
    arguments: list[str],
    trained: Path,
    tmp_path: Path,
) -> None:
    known = {"TEXT": trained / "text.txt", "MODEL": trained / "none", "OUT": tmp_path / "out"}
    code, _, stderr = run(*(known.get(a, a) for a in arguments))
    assert code == 2
    assert f"Invalid value for '{arguments[-2]}'" in stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "MODEL", "--temperature", "inf"], "--temperature must be a number"),
        (["generate", "MODEL", "--temperature", "1e-40"], "--temperature must be 0, the likeliest"),
        (["generate", "MODEL", "--beam", "2", "--top-k", "3"], "leave out --top-k"),
        (["score", "MODEL", "--text", "TEXT", "--device", "meta"], "'meta' holds no numbers"),
        (["score", "MODEL", "--text", "TEXT", "--out", ""], "Is a directory"),
        (["score", "MODEL", "--text", "TEXT", "--out", "TEXT"], "is an input, too"),
        (["score", "MODEL", "--text", "FOLDER", "--out", "TEXT"], "is an input, too"),
        (["score", "MODEL", "--text", ""], "the name of a text is empty"),
        (["export", "MODEL", "OUT", "--encoder-path", "x"], "--encoder-path goes with --encoder"),
        (["profile", "MODEL", "--text", "TEXT", "--json", "OUT", "--trace", "OUT"], "named twice"),
        (["profile", "MODEL", "--text", "TEXT", "--json", "/proc/x.json"], "No such file"),
        (["bench", "--report", "/proc/report.html"], "No such file"),
        (
            ["embed", "--text", "TEXT", "--encoder", "zeros", "--out", "OUT", "--max-tokens", "0"],
            "max tokens must be at least 1",
        ),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_what_makes_no_sense_is_said_before_the_work(
    arguments: list[str],
    message: str,
    trained: Path,
    tmp_path: Path,
) -> None:
    text = tmp_path / "texts" / "text.txt"
    text.parent.mkdir()
    shutil.copy(trained / "text.txt", text)
    known = {"TEXT": text, "FOLDER": text.parent, "MODEL": trained / "none", "OUT": tmp_path / "o"}
    assert message in fails(*(known.get(a, a) for a in arguments))
    assert text.read_text() == (trained / "text.txt").read_text()
    assert not (tmp_path / "o").exists()


# --- training


def test_a_loss_that_is_not_finite_ends_the_run(
    options,
    tmp_path: Path,
    capsys,
) -> None:
    out = tmp_path / "run"
    with pytest.raises(FusionLMError, match=r"the loss is (nan|inf) in epoch 1.*no model was made"):
        train(options(learning_rate=1e30, max_grad_norm=1e30), out)
    assert not (out / "model.safetensors").exists()


def test_the_best_model_so_far_is_kept(options, tmp_path: Path, monkeypatch) -> None:
    losses = iter([3.0, math.nan])
    monkeypatch.setattr(training, "evaluate_loss", lambda *_: next(losses))
    out = tmp_path / "run"
    with pytest.raises(FusionLMError, match=r"the dev loss is nan in epoch 2.*best .* is kept"):
        train(options(), out)
    assert [m["dev_loss"] for m in metrics(out)] == [3.0]
    assert len(list(out.glob("checkpoint-*"))) == 1
    fusion_model.load(str(out))


def test_a_run_is_of_its_texts(options, text_file: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "run", text_file.read_text()
    train(options(epochs=1), out)
    text_file.write_text(before + "One more sentence.\n")
    with pytest.raises(CheckpointError, match=r"other text \(train_text, dev_text changed since\)"):
        train(options(epochs=1), out)
    text_file.write_text(before)
    train(options(epochs=1), out)


def test_a_folder_begun_and_never_trained_takes_other_texts(
    options,
    text_file: Path,
    tmp_path: Path,
    monkeypatch,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "run"
    monkeypatch.setattr("fusion_model.training.data._embed", full)
    with pytest.raises(OSError, match="No space"):
        train(options(epochs=1), out)
    monkeypatch.undo()
    text_file.write_text("Quite another text, with other words.\n" * 9)
    train(options(epochs=1), out)
    train(options(epochs=1), tmp_path / "fresh")
    names = ("model.safetensors", "tokenizer.json")
    assert all((out / n).read_bytes() == (tmp_path / "fresh" / n).read_bytes() for n in names)


@pytest.mark.parametrize("name", ["training.json", "metrics.jsonl", "state.json"])
@pytest.mark.parametrize("content", ["{", "[]", '{"step": "x"}', "null", "\ufffe"])
def test_damaged_files_of_a_run_are_named(
    name: str,
    content: str,
    trained: Path,
    tmp_path: Path,
) -> None:
    out = copied(trained / "none", tmp_path / "run")
    kept = json.loads((out / "training.json").read_text())
    names = set(TrainingOptions.__dataclass_fields__)
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items() if k in names}
    path = next(out.rglob(name))
    path.write_text(content)
    with pytest.raises(FusionLMError, match=rf"{name} is damaged|checkpoint-0.* cannot be used"):
        train(TrainingOptions(**chosen), out)


def test_a_tokenizer_half_written_is_made_anew(options, tmp_path: Path, monkeypatch) -> None:
    from transformers import PreTrainedTokenizerFast

    def full(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")

    out = tmp_path / "run"
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        train(options(epochs=1), out)
    monkeypatch.undo()
    train(options(epochs=1), out)


def test_one_process_at_a_time(options, trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with locked(out / ".lock", "x"):
        code = "from fusion_model.files import locked\nfrom pathlib import Path\nimport sys\n"
        code += "with locked(Path(sys.argv[1]), 'the folder'): pass"
        other = [sys.executable, "-c", code, str(out / ".lock")]
        done = subprocess.run(other, capture_output=True, text=True)
        assert "the folder is in use by another process" in done.stderr
        with pytest.raises(FusionLMError, match="run is in use by another process"):
            train(options(), out)
    assert not list(out.iterdir())
    with locked(tmp_path / ".onnx.lock", "x"):
        assert "is in use" in fails("export", trained / "none", tmp_path / "onnx")


# --- text


@pytest.mark.parametrize("content", ["\ufeff", "\u00a0\u2003\n", "", " \n"])
def test_files_of_nothing_but_white_space_are_empty(
    content: str,
    trained: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "blank.txt"
    path.write_text(content, encoding="utf-8")
    for command in ("evaluate", "score"):
        assert "blank.txt is empty" in fails(command, trained / "none", "--text", path)
    with pytest.raises(FusionLMError, match="no sentence to score"):
        fusion_model.load(str(trained / "none")).perplexity([Document("x", [])])


def test_perplexity_a_word_of_text_without_spaces(trained: Path, tmp_path: Path) -> None:
    path = tmp_path / "a[draft].txt"
    path.write_text("子" * 500, encoding="utf-8")
    code, stdout, _ = run("evaluate", trained / "none", "--text", path)
    assert code == 0
    assert "inf" in stdout
    assert "[draft]" in stdout.replace("\n", "")
    found = json.loads(run("evaluate", trained / "none", "--text", path, "--json")[1])
    assert found["word_perplexity"] is None
    assert found["perplexity"] == pytest.approx(math.exp(found["nats"] / found["tokens"]))


SPECIAL = "A cat </s> is <s> not <pad> a [SEP] dog [CLS] [MASK]."


@pytest.mark.parametrize("fusion", ["none", "concat"])
def test_special_tokens_in_text_are_ordinary_characters(
    fusion: str,
    trained: Path,
    bert_folder: Path,
    monkeypatch,
) -> None:
    lm = fusion_model.load(str(trained / fusion))
    words = lm.score([Document("d", [SPECIAL])])
    assert [w.text for w in words] == [*SPECIAL.split(), "</s>"]
    assert all(w.tokens > 1 for w in words if w.text in ("<s>", "<pad>", "[SEP]"))
    row = lm.prompt_row(SPECIAL)
    assert not set(row[1:]) & {0, 1, 2}
    assert lm.tokenizer.decode(row[1:]) == SPECIAL
    if fusion == "concat":
        encoder = lm.planner.encoder
        given = lm.planner.inputs([row])[-1]
        head, rest = encoder.split(given)
        ids = [*head[:-1], *rest, head[-1]]
        apart = SPECIAL.replace("[", " [ ").replace("]", " ] ")
        assert ids == encoder.tokenizer(apart)["input_ids"]
        assert not {encoder.tokenizer.sep_token_id, encoder.tokenizer.mask_token_id} & {*ids[1:-1]}


LONG = " ".join(SENTENCES)  # some 250 encoder tokens, of which 62 fit


@pytest.mark.parametrize("policy", ["every", "word", "stride:3", "sentence", "incremental"])
def test_a_sentence_beyond_the_window_is_read_in_windows(
    policy: str,
    bpe,
    bert_folder: Path,
) -> None:
    encoder = load_encoder(str(bert_folder), "static+mean", policy=policy)
    planner = PrefixPlanner(encoder, bpe)
    ids = bpe(LONG)["input_ids"]
    found = planner.inputs([ids], [ids])
    assert planner.outgrown == [ids]
    assert len(found) == len(ids) + 1
    # No position sees what follows it.
    some = planner.inputs([ids[:150]], [ids])
    assert found[: len(some)] == some
    # Each sees at least half a window of what precedes it, as a text of its own.
    if policy == "every":
        for t in range(1, len(ids), 7):
            last = encoder.inputs_from_texts([bpe.decode(ids[max(t - 12, 0) : t]).strip()])[0]
            content = found[t].ids[4:-4]
            assert content[-8:] == last.ids[4:-4][-8:]
            assert min(t // 8, 12) < len(content) // 4 <= 62
    # Others in the same call are as they would be without.
    short = bpe(SENTENCES[0])["input_ids"]
    both = planner.inputs([short, ids], [(), short])
    assert both[: len(short) + 1] == planner.inputs([short])


@pytest.mark.parametrize("policy", ["every", "word", "stride:3", "sentence", "incremental"])
@pytest.mark.parametrize("shares", [False, True], ids=["bpe", "shared"])
def test_a_text_that_grows_beyond_the_window_is_read_as_in_scoring(
    policy: str, shares: bool, bpe, bert_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = load_encoder(str(bert_folder), "static+mean", policy=policy)
    tokenizer = cut_vocabulary(encoder.tokenizer, [LONG], 10_000) if shares else bpe
    planner = PrefixPlanner(encoder, tokenizer, shares_vocabulary=shares)
    odd = tokenizer("  a\n\n 漢字 🙂 é � x  y")["input_ids"]
    some = random.Random(0).choices(range(3, len(tokenizer)), k=100)
    row = (tokenizer.bos_token_id, *tokenizer(LONG)["input_ids"], *odd, *some)
    whole = planner.inputs([row])
    assert planner.outgrown
    stream, ends = PrefixStream(planner), range(1, len(row) + 1)
    assert [stream.inputs_of(row[:t], range(t - 1, t))[0] for t in ends] == whole
    assert PrefixStream(planner).inputs_of(row, range(len(row))) == whole
    assert PrefixStream(planner).inputs_of(row, range(len(row) - 1, len(row))) == whole[-1:]
    last = np.stack([stream.step([row])[0] for _ in range(3)])
    assert np.allclose(last, planner.encoder.encode(whole[-1:]), atol=1e-5)
    assert capsys.readouterr().err.count("outgrows the encoder's window") == 1
    assert not planner.outgrown  # which would else be taken for what is scored next


def test_words_beyond_the_window_are_scored_with_a_note(
    trained: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "long.txt"
    path.write_text(LONG)
    code, stdout, stderr = run("score", trained / "concat", "--text", path, "--split", "lines")
    assert code == 0
    assert len(stdout.splitlines()) == len(LONG.split()) + 2
    assert stderr.count("outgrow the encoder's window") == 1
    assert "the first begins 'The cat sat on the mat" in stderr


def test_other_views_still_name_the_sentence(bpe, bert_folder: Path) -> None:
    planner = PrefixPlanner(load_encoder(str(bert_folder)), bpe, "sentence")
    with pytest.raises(TooLong, match=r"does not fit the window of 64.*split the sentence"):
        planner.inputs([bpe(LONG)["input_ids"]])


# --- standard input and output


def test_standard_input_is_a_text(trained: Path, monkeypatch) -> None:
    data = io.BytesIO((trained / "text.txt").read_bytes())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(data))
    model, lines = trained / "none", ["--split", "lines"]
    from fusion_model.data.text import read_documents

    [document] = read_documents(["-"], "lines")
    assert (document.name, document.sentences) == ("-", SENTENCES)
    code, stdout, _ = run("score", model, "--text", trained / "text.txt", *lines, "--out", "-")
    assert code == 0
    assert stdout == run("score", model, "--text", trained / "text.txt", *lines)[1]


def test_output_is_utf8_and_tabs_in_names_are_none_in_tables(
    trained: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "a\tb\nc.txt"
    path.write_text("Das große Haus – 漢字.\n", encoding="utf-8")
    command = [sys.executable, "-m", "fusion_model", "score", str(trained / "none"), "--text", "-"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=path.read_bytes(), capture_output=True, env=environment)
    assert done.returncode == 0
    assert "große" in done.stdout.decode("utf-8")
    code, stdout, _ = run("score", trained / "none", "--text", path)
    assert code == 0
    rows = list(csv.reader(io.StringIO(stdout), delimiter="\t"))
    assert {row[0] for row in rows[1:]} == {str(path)}


def test_interrupts_say_what_is_true(trained: Path, tmp_path: Path, monkeypatch) -> None:
    import fusion_model.data.text as text_module

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(text_module, "read_documents", interrupted)
    code, _, stderr = run("score", trained / "none", "--text", "x")
    assert (code, stderr) == (130, "error: interrupted\n")
    monkeypatch.setattr("fusion_model.training.data.read_documents", interrupted)
    files = ["--train-file", trained / "text.txt", "--dev-file", trained / "text.txt"]
    code, _, stderr = run("train", *files, "--out", tmp_path / "run", *SMALL)
    assert code == 130
    assert (
        stderr == "error: interrupted; what was finished is kept, run the same command to go on\n"
    )


def test_ctrl_c_in_the_first_seconds_ends_quietly() -> None:
    code = "import sys, importlib\nreal = importlib.import_module\ndef stop(name, *a, **k):\n"
    code += "    if name.startswith('fusion_model.commands'): raise KeyboardInterrupt\n"
    code += (
        "    return real(name, *a, **k)\nimportlib.import_module = stop\nimport fusion_model.cli"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")
