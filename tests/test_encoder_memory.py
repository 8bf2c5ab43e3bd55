"""How many tokens an encoder takes at once."""

from pathlib import Path

import pytest
import torch
from conftest import SENTENCES
from test_cli import run

from fusion_model.data.tokenizer import train_bpe
from fusion_model.encoders import batching, load_encoder
from fusion_model.encoders.batching import token_budget
from fusion_model.encoders.pretrained import counted_tokens
from fusion_model.errors import EncoderError
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.training import data as preparation


def test_the_budget_is_what_helps() -> None:
    assert token_budget("cpu", 384, 4) == 2048
    assert token_budget("cuda", 384, 4) == 65536
    assert token_budget("cpu", 384, 2) == 4096
    assert token_budget("cuda", 768, 4) == 32768  # wider: fewer are enough
    assert token_budget("cpu", 16384, 4) == batching.LEAST


def test_batches_hold_the_users_tokens(bert_folder: Path) -> None:
    encoder = load_encoder(str(bert_folder), "mean")
    inputs = encoder.inputs_from_texts([s[:n] for s in SENTENCES[:8] for n in range(1, len(s))])
    expected = encoder.encode(inputs)
    with counted_tokens(encoder) as sizes:
        encoder.encode(inputs)
        assert len(sizes) == 1
        encoder.tokens_per_batch = 77
        torch.testing.assert_close(encoder.encode(inputs), expected, atol=1e-5, rtol=1e-5)
    assert sum(sizes[1:]) == sizes[0]
    assert max(sizes[1:]) <= 77
    assert load_encoder(str(bert_folder), "mean", tokens_per_batch=77).budget == 77
    with pytest.raises(EncoderError, match="at least 1 token at once, not 0"):
        load_encoder(str(bert_folder), "mean", tokens_per_batch=0)


@pytest.mark.parametrize("policy", ["every", "incremental"])
def test_out_of_memory_halves_the_budget(
    policy: str, bert_folder: Path, monkeypatch, capsys
) -> None:
    encoder = load_encoder(str(bert_folder), "mean", policy=policy)
    bpe = train_bpe(SENTENCES, 280)
    rows = [bpe(" ".join(SENTENCES[i : i + 2]))["input_ids"] for i in range(8)]
    inputs = PrefixPlanner(encoder, bpe).inputs(rows)
    expected = encoder.encode(inputs)
    most, failed = (600 if policy == "every" else 90), []
    run = encoder._layers.run

    def tight(hidden, *rest):
        if len(hidden) > most:
            failed.append(len(hidden))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(hidden, *rest)

    monkeypatch.setattr(encoder._layers, "run", tight)
    monkeypatch.setattr(batching, "LEAST", 20)
    encoder.tokens_per_batch = 4000
    torch.testing.assert_close(encoder.encode(inputs), expected, atol=1e-5, rtol=1e-5)
    assert failed
    assert encoder.tokens_per_batch < 4000
    assert "out of memory, going on with 2000 tokens a batch" in capsys.readouterr().err


def test_memory_that_is_too_small_is_named(bert_folder: Path, monkeypatch, capsys) -> None:
    encoder = load_encoder(str(bert_folder), "mean", tokens_per_batch=1000)

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encoder, "_batches", full)
    with pytest.raises(EncoderError, match="does not hold 256 encoder tokens: CUDA out of memory"):
        encoder.encode(encoder.inputs_from_texts(SENTENCES))
    told = capsys.readouterr().err
    assert "500 tokens a batch" in told
    assert "256 tokens a batch" in told


def test_what_was_done_before_is_not_done_again(bert_folder: Path, monkeypatch) -> None:
    encoder = load_encoder(str(bert_folder), "mean")
    asked = []

    def encode(inputs):
        asked.append(len(inputs))
        for place in range(len(inputs)):
            if encoder.budget > 1500 and place == 2:
                raise torch.OutOfMemoryError("full")
            yield [place], torch.full((1, encoder.dim), float(len(inputs[place].ids)))

    encoder.tokens_per_batch = 2000
    monkeypatch.setattr(encoder, "_batches", encode)
    inputs = encoder.inputs_from_texts(["", "the", "the cat", "the cat sat", "a dog sat on it"])
    assert encoder.encode(inputs)[:, 0].tolist() == [len(given.ids) for given in inputs]
    assert asked == [5, 3]


def test_embed_takes_the_users_batch(
    bert_folder: Path, text_file: Path, tmp_path: Path, monkeypatch
) -> None:
    asked = []
    load = preparation.load_encoder
    monkeypatch.setattr(
        preparation,
        "load_encoder",
        lambda *args, **options: asked.append(load(*args, **options)) or asked[-1],
    )
    arguments = ["--text", text_file, "--encoder", bert_folder, "--vocab-size", "300"]
    code, _, _ = run("embed", *arguments, "--out", tmp_path / "store", "--encoder-batch", "123")
    assert code == 0
    assert asked[0].budget == 123
