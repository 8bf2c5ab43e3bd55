"""A model under each policy, from training to text, as a user meets it."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES
from test_cli import SMALL, fails, run

import fusion_model
from fusion_model.data.corpus import Corpus
from fusion_model.encoders import load_encoder
from fusion_model.encoders.layers import ARCHITECTURES
from fusion_model.training.data import embed_text
from fusion_model.training.options import EmbedOptions, TrainingOptions
from fusion_model.training.run import train

POLICIES = ("word", "stride:3", "sentence", "incremental", "incremental+refresh:4")


@pytest.fixture(scope="module", params=POLICIES)
def trained(
    request, tmp_path_factory: pytest.TempPathFactory, bert_folder: Path
) -> tuple[str, Path]:
    """Trained on the command line, twice: the second run finds its store full."""
    folder = tmp_path_factory.mktemp("policy")
    text = folder / "text.txt"
    text.write_text("\n".join(SENTENCES) + "\n")
    files = ["--train-file", text, "--dev-file", text, "--policy", request.param]
    encoder = ["--encoder", bert_folder, "--pooling", "static+mean", "--store", folder / "store"]
    for out in ("first", "model"):
        options = [*files, *encoder, *SMALL, "--epochs", "2", "--learning-rate", "0.03"]
        code, _, _ = run("train", *options, "--out", folder / out)
        assert code == 0
    return request.param, folder


def test_a_saved_model_knows_its_policy(trained: tuple[str, Path]) -> None:
    policy, folder = trained
    assert json.loads((folder / "model" / "config.json").read_text())["policy"] == policy
    lm = fusion_model.load(str(folder / "model"))
    assert lm.planner.encoder.policy == policy
    assert json.loads((folder / "store" / "manifest.json").read_text())["policy"] == policy


def test_generated_text_is_what_whole_sentences_predict(trained: tuple[str, Path]) -> None:
    """Token by token the encoder streams; scoring takes sentences whole."""
    lm = fusion_model.load(str(trained[1] / "model"))
    ids = lm.prompt_ids("The cat")
    options = {"max_new_tokens": 12, "num_beams": 1, "do_sample": False, "eos_token_id": None}
    row = lm.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0]
    batch = lm.encode_corpus(Corpus([[*row.tolist(), 2]], [True], 1)).batch([0])
    e = torch.from_numpy(batch.prefix_embeds)
    with torch.no_grad():
        logits = lm.model(row[None], prefix_embeds=e).logits[0]
    predicted = logits.argmax(-1)[ids.shape[1] - 1 : -1]
    assert row[ids.shape[1] :].tolist() == predicted.tolist()
    beams = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), **options | {"num_beams": 3}
    )
    again = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), **options | {"num_beams": 3, "use_cache": False}
    )
    assert beams.tolist() == again.tolist()


def test_scores_and_perplexity_agree(trained: tuple[str, Path], text_file: Path) -> None:
    _, folder = trained
    model = folder / "model"
    code, stdout, _ = run("score", model, "--text", text_file, "--split", "lines")
    assert code == 0
    rows = [line.split("\t") for line in stdout.splitlines()[1:]]
    nats = sum(float(r[5]) for r in rows) / sum(int(r[6]) for r in rows)
    code, stdout, _ = run(
        "evaluate", model, "--text", text_file, "--split", "lines", "--store", folder / "store"
    )
    assert code == 0
    shown = re.search(r"nats per token\s+\S\s+([\d.]+)", stdout)
    assert shown
    assert float(shown[1]) == pytest.approx(nats, abs=2e-3)  # the store rounds to float16


def test_a_store_of_another_policy_is_refused(trained: tuple[str, Path], text_file: Path) -> None:
    policy, folder = trained
    message = fails(
        *("embed", "--text", text_file, "--encoder", "minilm", "--out", folder / "store"),
        *("--policy", "stride:7"),
    )
    assert "has" in message
    assert "name another store" in message
    model = fusion_model.load(str(folder / "model"))
    model.planner.encoder.policy = "stride:7"
    with pytest.raises(fusion_model.errors.StoreError, match=f"has policy '{policy[:4]}"):
        model.open_store(folder / "store")


def test_an_export_keeps_the_policy(trained: tuple[str, Path], text_file: Path) -> None:
    _, folder = trained
    model, out = folder / "model", folder / "onnx"
    code, _, _ = run("export", model, out, "--encoder")
    assert code == 0
    arguments = ["--text", text_file, "--split", "lines"]
    (_, ours, _), (_, exported, _) = (
        run("score", *where, *arguments) for where in ((model,), ("--onnx", out))
    )
    for a, b in zip(ours.splitlines()[1:], exported.splitlines()[1:], strict=True):
        assert a.split("\t")[:4] == b.split("\t")[:4]
        assert float(a.split("\t")[5]) == pytest.approx(float(b.split("\t")[5]), abs=1e-4)


def test_an_unknown_policy_is_one_line(text_file: Path, tmp_path: Path) -> None:
    message = fails(
        *("train", "--train-file", text_file, "--dev-file", text_file, "--out", tmp_path / "x"),
        *("--policy", "sometimes"),
    )
    assert "unknown policy 'sometimes': choose one of auto, every, word, stride:K" in message
    message = fails(
        *("train", "--train-file", text_file, "--dev-file", text_file, "--out", tmp_path / "y"),
        *("--policy", "incremental", "--encoder", "zeros"),
    )
    assert "'zeros' cannot be incremental" in message


@pytest.mark.parametrize("view", ["sentence", "masked"])
def test_static_is_never_of_a_token_to_come(view: str, text_file: Path, tmp_path: Path) -> None:
    options = "--view", view, "--pooling", "static+mean", "--out", tmp_path / "x"
    for command in (
        ("train", "--train-file", text_file, "--dev-file", text_file),
        ("embed", "--text", text_file, "--encoder", "minilm"),
    ):
        assert f"view '{view}' goes with poolings without static" in fails(*command, *options)


@pytest.mark.parametrize(
    ("changes", "pooling", "policy"),
    [
        ({}, "static+last@1+mean@1", "incremental"),
        ({"policy": "every"}, "static+last@1+mean@1", "every"),
        ({"view": "sentence"}, "mean", "every"),
        ({"view": "left:0.5"}, "static+last@1+mean@1", "every"),
        ({"pooling": "cls"}, "cls", "incremental"),
        ({"encoder": "counts"}, "counts", "every"),
    ],
    ids=str,
)
def test_what_is_taken_where_nothing_is_said(
    changes: dict[str, str],
    pooling: str,
    policy: str,
    bert_folder: Path,
    text_file: Path,
    tmp_path: Path,
) -> None:
    """Of two layers the first is the middle one."""
    files = (str(text_file),)
    sizes = {"vocab_size": 300, "embedding_size": 8, "hidden_size": 8, "epochs": 1}
    options = TrainingOptions(
        train_file=files, dev_file=files, **{"encoder": str(bert_folder)} | sizes | changes
    )
    train(options, tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (saved["pooling"], saved["policy"]) == (pooling, policy)
    assert f"policy `{policy}`" in (tmp_path / "model" / "README.md").read_text()


def test_an_unknown_architecture_is_encoded_at_every_token(bert_folder: Path, monkeypatch) -> None:
    monkeypatch.delitem(ARCHITECTURES, "bert")
    encoder = load_encoder(str(bert_folder), "auto", policy="auto")
    assert (encoder.pooling, encoder.policy) == ("static+last@1+mean@1", "every")


def test_vectors_for_a_model_are_of_its_kind(trained: tuple[str, Path], tmp_path: Path) -> None:
    policy, folder = trained
    text, model = folder / "text.txt", folder / "model"
    embed_text(EmbedOptions(text=(str(text),), model=str(model)), tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["policy"] == policy
