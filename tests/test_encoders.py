"""Batched, deduplicated encoding against the encoder called one text at a time."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, SENTENCES
from transformers import AutoModel, AutoTokenizer

from fusion_model.encoders import load_encoder, sources
from fusion_model.encoders import pretrained as hf_encoder
from fusion_model.encoders.pooling import POOLINGS
from fusion_model.encoders.pretrained import counted_tokens
from fusion_model.encoders.sources import minilm_path
from fusion_model.errors import EncoderError

TEXTS = ["", "The", *SENTENCES[:6], "The cat", "", "the CAT sat"]


@torch.no_grad()
def pooled(model, tokenizer, text: str, pooling: str) -> torch.Tensor:
    """One text, by the definition of each pooling."""
    ids = tokenizer(text)["input_ids"]
    if pooling == "mask":
        ids = [*ids[:-1], tokenizer.mask_token_id, ids[-1]]
    out = model(input_ids=torch.tensor([ids]))
    hidden = out.last_hidden_state[0]
    if pooling == "static":
        return model.get_input_embeddings().weight[ids[-2]]
    if pooling == "pooler":
        return out.pooler_output[0]
    return {
        "cls": hidden[0],
        "mean": hidden.mean(0),
        "last": hidden[-2],
        "mask": hidden[-2],
        "sep": hidden[-1],
    }[pooling]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_batched_is_one_at_a_time(
    name: str, pooling: str, encoder_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(encoder_folders[name])
    if pooling == "pooler" and name == "distilbert":
        with pytest.raises(EncoderError, match="has no pooler"):
            load_encoder(folder, pooling)
        return
    monkeypatch.setattr(hf_encoder.HFEncoder, "budget", 20)  # several batches a length
    encoder = load_encoder(folder, pooling)
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    got = encoder.encode(encoder.inputs_from_texts(TEXTS))
    expected = torch.stack([pooled(model, tokenizer, text, pooling) for text in TEXTS])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_joined_poolings_are_side_by_side(bert_folder: Path) -> None:
    both = load_encoder(str(bert_folder), "static+mean+mask")
    vectors = both.encode(both.inputs_from_texts(TEXTS)).chunk(3, dim=1)
    for part, pooling in zip(vectors, ("static", "mean", "mask"), strict=True):
        alone = load_encoder(str(bert_folder), pooling)
        torch.testing.assert_close(part, alone.encode(alone.inputs_from_texts(TEXTS)))


def test_static_needs_the_last_token_only(bert_folder: Path) -> None:
    encoder = load_encoder(str(bert_folder), "static")
    a, b, c = encoder.inputs_from_texts(["the cat", "a cat", "the dog"])
    assert a == b != c


def test_duplicates_run_once(bert_folder: Path) -> None:
    encoder = load_encoder(str(bert_folder), "mean")
    inputs = encoder.inputs_from_texts(TEXTS * 3)
    encoder.encode(inputs[:1])  # the first texts run twice, to prove our own pass
    with counted_tokens(encoder) as sizes:
        encoder.encode(inputs)
    assert sum(sizes) == sum(len(given.ids) // 4 for given in set(inputs))
    assert len(set(inputs)) < len(inputs)


def test_bfloat16_is_close_and_has_its_own_fingerprint(bert_folder: Path) -> None:
    exact, rounded = (
        load_encoder(str(bert_folder), "mean", dtype=d) for d in ("float32", "bfloat16")
    )
    inputs = exact.inputs_from_texts(TEXTS)
    torch.testing.assert_close(rounded.encode(inputs), exact.encode(inputs), atol=0.1, rtol=0.1)
    assert exact.content_sha256 == rounded.content_sha256
    assert exact.fingerprint != rounded.fingerprint


def test_content_hash_follows_the_weights(bert_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(bert_folder, copy)
    assert load_encoder(str(copy)).content_sha256 == load_encoder(str(bert_folder)).content_sha256
    model = AutoModel.from_pretrained(copy)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[0] += 1
    model.save_pretrained(copy)
    assert load_encoder(str(copy)).content_sha256 != load_encoder(str(bert_folder)).content_sha256


def test_window_is_the_encoders(bert_folder: Path, encoder_folders: dict[str, Path]) -> None:
    encoder = load_encoder(str(bert_folder), "mean")
    fits = "a " * 62
    assert len(encoder.encode(encoder.inputs_from_texts([fits]))) == 1
    with pytest.raises(EncoderError, match=r"65 encoder tokens does not fit the window of 64"):
        encoder.inputs_from_texts([fits + "a"])
    roberta = load_encoder(str(encoder_folders["roberta"]), "mean")
    assert roberta.window == 63  # positions begin after the padding index
    roberta.encode(roberta.inputs_from_texts(["a " * 61]))
    with pytest.raises(EncoderError, match="does not fit"):
        roberta.inputs_from_texts(["a " * 62])
    masked = load_encoder(str(bert_folder), "mask")
    with pytest.raises(EncoderError, match="window of 63"):
        masked.inputs_from_texts([fits])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere/at-all",), "cannot load the encoder 'nowhere/at-all'"),
        (("minilm", "max"), "unknown pooling 'max': choose from cls, mean"),
        (("minilm", "static+"), "unknown pooling ''"),
        (("tfidf",), "tfidf encoder is fitted while training"),
    ],
)
def test_mistakes_are_named(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(EncoderError, match=message):
        load_encoder(*arguments)


def test_pickled_weights_are_not_read(bert_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(bert_folder, folder)
    model = AutoModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="cannot load the encoder"):
        load_encoder(str(folder))


def test_nan_is_refused(bert_folder: Path) -> None:
    encoder = load_encoder(str(bert_folder), "mean")
    with torch.no_grad():
        encoder.model.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(EncoderError, match=r"gave NaN or infinity in torch\.float32"):
        encoder.encode(encoder.inputs_from_texts(["the cat"]))


def test_minilm_is_upstreams(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = minilm_path()
    encoder = load_encoder("minilm", "mean")
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    got = encoder.encode(encoder.inputs_from_texts(TEXTS))
    expected = torch.stack([pooled(model.eval(), tokenizer, t, "mean") for t in TEXTS])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    monkeypatch.setattr(sources, "MINILM_SHA256", "0" * 64)
    with pytest.raises(EncoderError, match="is not all-MiniLM-L6-v2: its sha256 is 53aa51172d"):
        minilm_path()
