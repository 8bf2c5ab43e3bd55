"""Decoding on the device, in Triton's interpreter, against the model's own forward pass."""

import pytest
import torch
from conftest import small_model
from torch import Tensor

from fusion_model import FUSIONS, FusionLMForCausalLM

pytest.importorskip("triton")

from fusion_model.kernels.triton_decode import decode_choose

from fusion_model.device_generation import generate_on_device


def greedy(model: FusionLMForCausalLM, ids: Tensor, e: Tensor | None, steps: int) -> Tensor:
    """By the equations, the whole sequence anew for each token."""
    model.set_backend("reference")
    done = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(steps):
        with torch.no_grad():
            token = model(ids, prefix_embeds=e).logits[:, -1].argmax(-1)
        token = torch.where(done, model.config.eos_token_id, token)
        done |= token == model.config.eos_token_id
        ids = torch.cat([ids, token[:, None]], 1)
    return ids


@pytest.mark.parametrize(("prompt", "layers"), [(1, 2), (3, 1)])
@pytest.mark.parametrize("fusion", [f for f in FUSIONS if f != "input"])
def test_greedy_is_the_models(fusion: str, prompt: int, layers: int) -> None:
    model = small_model(fusion=fusion, num_layers=layers, vocab_size=70, initializer_range=2.0)
    ids, e = torch.randint(3, 70, (3, prompt)), torch.randn(3, 5) * 3
    prefix = None if fusion == "none" else e
    got = generate_on_device(model, ids, prefix, max_new_tokens=6, graph=False)
    assert torch.equal(got, greedy(model, ids, prefix, 6))


def choose(logits: Tensor, count: int, temperature: float, top_k: int, seed: int = 5) -> Tensor:
    batch, v = logits.shape
    ids, done = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.uint8)
    tokens = torch.zeros(count + 1, batch, dtype=torch.int64)
    decode_choose[(batch,)](
        logits, ids, tokens, done, torch.tensor([count]), torch.tensor([seed]),
        torch.tensor([temperature or 1.0]), v, batch, count + 1, top_k, -1,
        GREEDY=temperature == 0, TOP_K=top_k > 0, BLOCK_V=128,
    )  # fmt: skip
    assert torch.equal(tokens[count], ids)
    return ids


def test_sampling_has_the_softmaxs_frequencies() -> None:
    logits, temperature = torch.randn(5), 0.7
    drawn = torch.cat(
        [choose(logits.expand(150, 5).contiguous(), n, temperature, 0) for n in (0, 1)]
    )
    frequency = torch.bincount(drawn, minlength=5) / len(drawn)
    expected = torch.softmax(logits / temperature, -1)
    assert (frequency - expected).abs().max() < 0.1  # 3.5 standard deviations
    assert not torch.equal(drawn[:150], drawn[150:])


@pytest.mark.parametrize("k", [1, 3, 99])
def test_top_k_keeps_the_k_greatest(k: int) -> None:
    logits = torch.randn(15, 100) * 5
    allowed = logits >= logits.topk(k).values[:, -1:]
    tokens = choose(logits, 0, 50.0, k)
    assert allowed[torch.arange(15), tokens].all()
    if k == 1:
        assert torch.equal(tokens, logits.argmax(-1))
    else:
        assert not torch.equal(tokens, logits.argmax(-1))


def test_samples_depend_on_the_seed_alone() -> None:
    logits = torch.randn(50, 100)
    once = choose(logits[:20], 3, 1.0, 10)
    assert torch.equal(once, choose(logits[:20], 3, 1.0, 10))
    assert not torch.equal(once, choose(logits[:20], 3, 1.0, 10, seed=6))


def test_what_cannot_be_decoded_says_why() -> None:
    ids = torch.ones(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="fusion='input'"):
        generate_on_device(small_model(fusion="input"), ids, torch.randn(1, 5))
    with pytest.raises(ValueError, match=r"one embedding a sequence.*\[B, 5\]"):
        generate_on_device(small_model(fusion="add"), ids, torch.randn(1, 2, 5))
    model = small_model(fusion="none")
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        generate_on_device(model, ids, max_new_tokens=1, graph=True)
