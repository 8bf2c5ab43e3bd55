"""Our own loop in `generate` on a CPU against transformers', which `return_dict_in_generate` asks
for."""

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import small_model
from torch import Tensor

from fusion_model import FusionLMForCausalLM, decoding
from fusion_model.config import FUSIONS


def growing(ids: Tensor, mask: Tensor, start: int) -> Tensor:
    """An embedding of all that a prefix holds: padding does not count."""
    held = (ids * mask).float()[:, :, None] * torch.arange(1, 6) * 0.05
    return torch.sin(held.cumsum(1))[:, start:]


def model_of(fusion: str, **options: Any) -> FusionLMForCausalLM:
    torch.manual_seed(2)
    model = small_model(fusion=fusion, vocab_size=40, initializer_range=2.0, **options)
    with torch.no_grad():  # so that tokens vary
        for weights in model.lstm.parameters():
            weights.mul_(4)
    model.prefix_encoder = growing
    return model


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each call of our own loop."""
    calls: list[Any] = []
    ours = decoding.decode_on_host
    monkeypatch.setattr(
        decoding, "decode_on_host", lambda *args: calls.append(args[5]) or ours(*args)
    )
    return calls


@pytest.mark.parametrize("embeds", ["growing", "one"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_greedy_is_that_of_transformers(fusion: str, embeds: str, served: list[Any]) -> None:
    """Prompts padded on the left; each row ends at its own token."""
    model = model_of(fusion)
    ids = torch.randint(3, 40, (4, 5))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    if embeds == "one":
        options["prefix_embeds"] = torch.randn(4, 5)
    free = model.generate(ids, **options)
    eos = Counter(free[:, 6:10].flatten().tolist()).most_common(1)[0][0]
    for ends in ({}, {"eos_token_id": eos, "pad_token_id": 0}):
        theirs = model.generate(ids, return_dict_in_generate=True, **options, **ends)
        assert torch.equal(model.generate(ids, **options, **ends), theirs.sequences)
    assert len(served) == 3


def test_samples_follow_the_model(served: list[Any]) -> None:
    model = model_of("concat")
    ids = torch.tensor([[3, 4, 5]]).expand(2000, -1)
    with torch.no_grad():
        logits = model(ids[:1], prefix_embeds=growing(ids[:1], torch.ones(1, 3), 0)).logits[0, -1]
    sampling: dict[str, Any] = {"do_sample": True, "max_new_tokens": 1, "temperature": 3.0}
    for k in (0, 4):
        torch.manual_seed(0)
        drawn = model.generate(ids, top_k=k, **sampling)[:, -1]
        torch.manual_seed(0)
        assert torch.equal(drawn, model.generate(ids, top_k=k, **sampling)[:, -1])
        kept = torch.full_like(logits, -torch.inf)
        best = logits.topk(k or 40).indices
        kept[best] = logits[best] / 3
        expected = torch.softmax(kept, -1)
        frequency = torch.bincount(drawn, minlength=40) / len(drawn)
        assert (frequency - expected).abs().max() < 0.04
        assert set(drawn.tolist()) <= set(best.tolist())
    assert [choice.top_k for choice in served] == [0, 0, 4, 4]


def test_other_requests_are_left_to_transformers(served: list[Any]) -> None:
    model = model_of("concat")
    ids = torch.tensor([[3, 4, 5]])
    for options in ({"num_beams": 2}, {"repetition_penalty": 1.3}, {"min_new_tokens": 2}):
        model.generate(ids, max_new_tokens=4, do_sample=False, **options)
    model.train().generate(ids, max_new_tokens=2, do_sample=False)
    assert not served
