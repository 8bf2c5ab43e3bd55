"""Programs that researchers use give the numbers that `fusion-lm score` gives, fused or not."""

from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, small_model
from transformers import AutoModelForCausalLM

import fusion_model
from fusion_model.data.text import Document
from fusion_model.encoders import load_encoder
from fusion_model.errors import EncoderError, FusionLMError
from fusion_model.language_model import FusionLM
from fusion_model.model import FusionLMForCausalLM


@pytest.fixture
def unfused(bpe) -> FusionLM:
    return FusionLM(small_model(fusion="none", vocab_size=len(bpe)), bpe, None)


@pytest.fixture
def fused_folder(bpe, bert_folder: Path, tmp_path: Path) -> Path:
    """As `fusion-lm train` leaves it, with weights in float16."""
    encoder = load_encoder(str(bert_folder), "mean")
    named = {"encoder": encoder.name, "encoder_sha256": encoder.content_sha256, "pooling": "mean"}
    model = small_model(fusion="concat", vocab_size=len(bpe), prefix_size=16, **named)
    model.half().save_pretrained(tmp_path / "fused")
    bpe.save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


@pytest.fixture(params=["unfused", "fused"])
def lm(request: pytest.FixtureRequest) -> FusionLM:
    """What clients get: a fused model comes by its Auto class, without an encoder."""
    if request.param == "unfused":
        found: FusionLM = request.getfixturevalue("unfused")
        return found
    folder = request.getfixturevalue("fused_folder")
    whole = fusion_model.load(str(folder))
    whole.model = AutoModelForCausalLM.from_pretrained(folder)
    return whole


def sentence_nats(lm: FusionLM, sentence: str) -> float:
    """Without the sentence end, which these clients do not score."""
    return sum(w.nats for w in lm.score([Document("d", [sentence])]) if w.text != "</s>")


def test_minicons(lm: FusionLM) -> None:
    from minicons.scorer import IncrementalLMScorer

    scorer = IncrementalLMScorer(lm.model, "cpu", tokenizer=lm.tokenizer)
    scored = scorer.token_score(SENTENCES[:4], bos_token=True, surprisal=True)
    for sentence, tokens in zip(SENTENCES[:4], scored, strict=True):
        own = [w.nats for w in lm.score([Document("d", [sentence])])]
        assert sum(s for _, s in tokens) == pytest.approx(sentence_nats(lm, sentence), abs=1e-4)
        assert tokens[0][1] == 0 or tokens[0][1] == pytest.approx(own[0], abs=1e-4)


def test_lm_eval(lm: FusionLM) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    client = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, device="cpu", max_length=200)
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(s,), idx=i)
        for i, s in enumerate(SENTENCES[:4])
    ]
    # Its rolling likelihood begins after `prefix_token_id`: BOS, as ours does.
    assert client.prefix_token_id == lm.tokenizer.bos_token_id
    got = client.loglikelihood_rolling(requests, disable_tqdm=True)
    expected = [-sentence_nats(lm, s) for s in SENTENCES[:4]]
    assert got == pytest.approx(expected, abs=1e-4)
    pair = Instance("loglikelihood", {}, ("The cat sat", " on the mat."), 0)
    [(nats, _)] = client.loglikelihood([pair], disable_tqdm=True)
    whole = lm.tokenizer("The cat sat on the mat.", return_tensors="pt")["input_ids"]
    start = len(lm.tokenizer("The cat sat")["input_ids"])
    logits = lm.model(whole).logits[0, :-1].double()
    each = torch.log_softmax(logits, -1).gather(1, whole[0, 1:, None])[:, 0]
    assert nats == pytest.approx(float(each[start - 1 :].detach().sum()), abs=1e-4)


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, FusionLMForCausalLM])
def test_a_model_by_its_class_brings_its_encoder(kind, fused_folder: Path) -> None:
    model, whole = kind.from_pretrained(fused_folder), fusion_model.load(str(fused_folder))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert kind.from_pretrained(fused_folder, dtype=torch.float16).dtype == torch.float16
    ids = whole.prompt_ids("The cat sat")
    assert torch.equal(model(ids).logits, whole.model(ids).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), whole.model.generate(ids, **options))


def test_a_model_whose_encoder_is_gone_says_so(fused_folder: Path, bert_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(fused_folder)
    model.config.encoder_sha256 = "0" * 64
    with pytest.raises(EncoderError, match="was trained with another encoder"):
        model(torch.tensor([[1, 5]]))
    (fused_folder / "tokenizer.json").unlink()
    (fused_folder / "tokenizer_config.json").unlink()
    with pytest.raises(EncoderError, match="lacks its tokenizer"):
        model(torch.tensor([[1, 5]]))


def test_a_folder_for_a_hub_is_whole_and_has_no_training_state(
    fused_folder: Path, tmp_path: Path
) -> None:
    (fused_folder / "README.md").write_text("# A model\n")
    (fused_folder / "training.json").write_text("{}")
    (fused_folder / "checkpoint-00000001").mkdir()
    lm, hub = fusion_model.load(str(fused_folder)), tmp_path / "hub"
    lm.save_pretrained(hub)
    assert {p.name for p in hub.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "sha256.json"),
    }
    assert fusion_model.load(str(hub)).score("A cat.") == lm.score("A cat.")
    (tmp_path / "file").touch()
    with pytest.raises(FusionLMError, match="cannot write"):
        lm.save_pretrained(tmp_path / "file")


def test_forward_as_transformers_knows_it() -> None:
    model = small_model(fusion="add")
    ids, e = torch.tensor([[1, 5, 7]]), torch.randn(1, 3, 5)
    with pytest.raises(TypeError, match="prefix_embed"):
        model(ids, prefix_embed=e)
    out = model(ids, prefix_embeds=e, output_hidden_states=True)
    scores, _, states = model(ids, prefix_embeds=e, output_hidden_states=True, return_dict=False)
    assert torch.equal(scores, out.logits)
    embedded, hidden, features = states
    assert torch.equal(embedded, model.embed_tokens(ids))
    torch.testing.assert_close(hidden, model.lstm(embedded)[0])
    e_projected = model.prefix_projection(e * model.prefix_scale)
    torch.testing.assert_close(features, model.projection(hidden + e_projected))
    torch.testing.assert_close(out.logits, model.lm_head(features))
    assert model(ids, prefix_embeds=e).hidden_states is None
    with pytest.raises(ValueError, match=r"pass \[B, E\]"):
        model.generate(ids, prefix_embeds=e, max_new_tokens=2)
    kept = {"return_dict_in_generate": True, "output_hidden_states": True, "max_new_tokens": 2}
    made = model.generate(ids, prefix_embeds=e[:, 0], eos_token_id=None, **kept)
    assert [s[1].shape[1] for s in made.hidden_states] == [3, 1]


def test_trainer_of_transformers_trains_it(unfused: FusionLM, tmp_path: Path) -> None:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    data = [{"input_ids": [1, *unfused.tokenizer(s)["input_ids"], 2]} for s in SENTENCES]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=30,
        learning_rate=0.02,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(
        unfused.model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorForLanguageModeling(unfused.tokenizer, mlm=False),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 0.5
