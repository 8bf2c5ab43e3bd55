"""Programs that researchers use give the numbers that `fusion-lm score` gives."""

from pathlib import Path

import pytest
import torch
from conftest import SENTENCES, small_model

from fusion_model.data.text import Document
from fusion_model.language_model import FusionLM


@pytest.fixture
def unfused(bpe) -> FusionLM:
    return FusionLM(small_model(fusion="none", vocab_size=len(bpe)), bpe, None)


def sentence_nats(lm: FusionLM, sentence: str) -> float:
    """Without the sentence end, which these clients do not score."""
    return sum(w.nats for w in lm.score([Document("d", [sentence])]) if w.text != "</s>")


def test_minicons(unfused: FusionLM) -> None:
    from minicons.scorer import IncrementalLMScorer

    scorer = IncrementalLMScorer(unfused.model, "cpu", tokenizer=unfused.tokenizer)
    scored = scorer.token_score(SENTENCES[:4], bos_token=True, surprisal=True)
    for sentence, tokens in zip(SENTENCES[:4], scored, strict=True):
        own = [w.nats for w in unfused.score([Document("d", [sentence])])]
        assert sum(s for _, s in tokens) == pytest.approx(
            sentence_nats(unfused, sentence), abs=1e-4
        )
        assert tokens[0][1] == 0 or tokens[0][1] == pytest.approx(own[0], abs=1e-4)


def test_lm_eval(unfused: FusionLM) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    client = HFLM(
        pretrained=unfused.model, tokenizer=unfused.tokenizer, device="cpu", max_length=200
    )
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(s,), idx=i)
        for i, s in enumerate(SENTENCES[:4])
    ]
    # Its rolling likelihood begins after `prefix_token_id`: BOS, as ours does.
    assert client.prefix_token_id == unfused.tokenizer.bos_token_id
    got = client.loglikelihood_rolling(requests, disable_tqdm=True)
    expected = [-sentence_nats(unfused, s) for s in SENTENCES[:4]]
    assert got == pytest.approx(expected, abs=1e-4)
    pair = Instance("loglikelihood", {}, ("The cat sat", " on the mat."), 0)
    [(nats, _)] = client.loglikelihood([pair], disable_tqdm=True)
    whole = unfused.tokenizer("The cat sat on the mat.", return_tensors="pt")["input_ids"]
    start = len(unfused.tokenizer("The cat sat")["input_ids"])
    logits = unfused.model(whole).logits[0, :-1].double()
    each = torch.log_softmax(logits, -1).gather(1, whole[0, 1:, None])[:, 0]
    assert nats == pytest.approx(float(each[start - 1 :].detach().sum()), abs=1e-4)


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
