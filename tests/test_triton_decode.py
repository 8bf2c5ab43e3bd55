"""Decoding kernels in Triton's interpreter: against the model's forward pass, and PyTorch."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import small_model
from torch import Tensor, nn
from triton_bf16 import right_bfloat16

from fusion_model import FUSIONS, FusionLMForCausalLM

pytest.importorskip("triton")

from fusion_model.kernels.check.decode_cases import copied
from fusion_model.kernels.triton import decoder as triton_token
from fusion_model.kernels.triton import guards
from fusion_model.kernels.triton.decode import choose, kernel_token
from fusion_model.kernels.triton.decode_naive import Token, philox, plain_token, scores
from fusion_model.kernels.triton.decoder import Decoder, DecodeWeights, TokenGraph

from fusion_model.decoding import needs_host, obstacle


@pytest.fixture(autouse=True)
def _bfloat16() -> Iterator[None]:
    with right_bfloat16():
        yield


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
        if done.all():
            break
    return ids


@pytest.mark.parametrize(("prompt", "layers"), [(1, 2), (3, 1)])
@pytest.mark.parametrize("fusion", [f for f in FUSIONS if f != "input"])
def test_greedy_is_the_models(fusion: str, prompt: int, layers: int) -> None:
    model = small_model(fusion=fusion, num_layers=layers, vocab_size=70, initializer_range=2.0)
    ids, e = torch.randint(3, 70, (3, prompt)), torch.randn(3, 5) * 3
    prefix = None if fusion == "none" else e
    expected = greedy(model, ids, prefix, 6)
    model.set_backend("triton")
    options = {} if prefix is None else {"prefix_embeds": prefix}
    got = model.generate(ids, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(got, expected)


KINDS = {"plain": {}, "multiply": {"multiplies": True}, "gate": {"gate": True}}


def decoder(
    dtype: torch.dtype, kind: str = "plain", batch: int = 3, hidden: int = 20, **options: Any
) -> Decoder:
    """Two layers with random weights, in the middle of a sequence."""
    module = nn.LSTM(7, hidden, 2).to(dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    flags = {k: random(hidden, hidden) if k == "gate" else v for k, v in KINDS[kind].items()}
    weights = DecodeWeights(
        random(50, 7), module.all_weights, random(9, hidden), random(50, 9), random(50), **flags
    )
    found = Decoder(weights, batch, 4, **options)
    found.set_prefix(random(batch, 9), random(batch, hidden), random(batch, hidden))
    state = random(batch, 2, hidden), random(batch, 2, hidden)
    found.start(torch.randint(50, (batch,)), *state, seed=3, temperature=0.7)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 17])
def test_a_token_within_the_error_of_pytorch(batch: int, kind: str, dtype: torch.dtype) -> None:
    """|kernel - float64| <= |PyTorch in the same dtype - float64| + small: state and logits."""
    token = decoder(dtype, kind, batch).steps[0]
    results = []
    for run, wide in ((plain_token, torch.float64), (plain_token, None), (kernel_token, None)):
        args = copied(token, wide)
        results.append([t.double() for t in (run(args), args.h_next, args.c)])
    small = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for exact, eager, kernel in zip(*results, strict=True):
        budget = (eager - exact).abs().max() + small * (exact.abs().max() + 1)
        assert (kernel - exact).abs().max() <= budget


CHOICES = [{"greedy": True}, {"greedy": False}, {"greedy": False, "top_k": 5}]


@pytest.mark.parametrize("options", CHOICES, ids=["greedy", "all", "top k"])
def test_tokens_are_those_of_pytorch(options: dict[str, Any]) -> None:
    """The same noise, too; sequences end, and go on with the padding."""
    one = decoder(torch.float32, "gate", 10, eos=11, pad=2, **options)
    other = [copied(token) for token in one.steps]
    shared = {name: getattr(other[0], name) for name in (*other[0].written, "h")}
    shared |= {"h": shared["h_next"], "h_next": shared["h"]}
    other[1] = other[1]._replace(**shared)
    one.steps[0].done[7] = other[0].done[7] = 1
    for n in range(4):
        logits = plain_token(other[n % 2])
        one.step()
        assert one.logits is not None
        torch.testing.assert_close(one.logits, logits)
    assert torch.equal(one.tokens, other[0].tokens)
    assert one.tokens[:, 7].tolist() == [2] * 4
    assert torch.equal(one.done, other[0].done)
    assert torch.equal(one.done, ((one.tokens == 11).any(0) | (torch.arange(10) == 7)).byte())
    for got, wanted in zip(one.state(), (other[0].h, other[0].c), strict=True):
        torch.testing.assert_close(got, wanted.transpose(0, 1)[..., :20])


@pytest.mark.parametrize(
    ("word", "counter", "key"),
    [(0x6627E8D5, 0, 0), (0x408F276D, 0xFFFFFFFF, -1)],  # Random123's known answers
)
def test_philox(word: int, counter: int, key: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.tensor([counter])
    monkeypatch.setattr(torch, "zeros_like", lambda _: ones)  # its fourth word is 0 otherwise
    assert philox(torch.tensor([key]), ones, ones, ones).tolist() == [word]


def chosen(logits: Tensor, count: int, temperature: float, top_k: int, seed: int = 5) -> Tensor:
    """By the kernel; the same as by PyTorch."""
    batch = len(logits)
    args = decoder(torch.float32, batch=batch, greedy=False, top_k=top_k).steps[0]
    args.made.fill_(count)
    args.seed.fill_(seed)
    args.temperature.fill_(temperature)
    expected = scores(logits, args).argmax(-1)
    choose(logits, args)
    assert torch.equal(args.ids, expected)
    assert torch.equal(args.tokens[count], args.ids)
    return args.ids


def test_sampling_has_the_softmaxs_frequencies() -> None:
    logits, temperature = torch.randn(5), 0.7
    drawn = torch.cat(
        [chosen(logits.expand(150, 5).contiguous(), n, temperature, 0) for n in (0, 1)]
    )
    frequency = torch.bincount(drawn, minlength=5) / len(drawn)
    expected = torch.softmax(logits / temperature, -1)
    assert (frequency - expected).abs().max() < 0.1  # 3.5 standard deviations
    assert not torch.equal(drawn[:150], drawn[150:])


@pytest.mark.parametrize("k", [1, 3, 99])
def test_top_k_keeps_the_k_greatest(k: int) -> None:
    logits = torch.randn(15, 100) * 5
    allowed = logits >= logits.topk(k).values[:, -1:]
    tokens = chosen(logits, 0, 50.0, k)
    assert allowed[torch.arange(15), tokens].all()
    assert torch.equal(tokens, logits.argmax(-1)) == (k == 1)


@pytest.mark.parametrize("k", [0, 5])
def test_large_vocabularies(k: int) -> None:
    """Block after block; of two that are as good, in blocks apart, the first."""
    logits = torch.randn(2, 131_072)
    logits[1, [20_000, 131_071]] = logits.max() + 1
    assert chosen(logits, 0, 1e-6, k)[0] == logits[0].argmax()
    args = decoder(torch.float32, batch=2).steps[0]
    choose(logits, args)
    assert args.ids.tolist() == [int(logits[0].argmax()), 20_000]


def test_samples_depend_on_the_seed_alone() -> None:
    logits = torch.randn(50, 100)
    once = chosen(logits[:20], 3, 1.0, 10)
    assert torch.equal(once, chosen(logits[:20], 3, 1.0, 10))
    assert not torch.equal(once, chosen(logits[:20], 3, 1.0, 10, seed=6))


@pytest.mark.parametrize("wrong", ["logits", "token", "error"])
def test_a_wrong_kernel_is_named_and_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(guards, "checked", {})
    right = triton_token.kernel_token

    def kernel(args: Token) -> Tensor:
        logits = right(args)
        if wrong == "error":
            raise RuntimeError("no such instruction")
        if wrong == "token":
            args.ids.copy_(logits.argmin(-1))
        return logits * 1.2 if wrong == "logits" else logits

    monkeypatch.setattr(triton_token, "kernel_token", kernel)
    one = decoder(torch.float32)
    other = copied(one.steps[0])
    with pytest.warns(RuntimeWarning, match="decode_token .*PyTorch computes"):
        one.step()
    assert one.logits is not None
    torch.testing.assert_close(one.logits, plain_token(other))
    assert torch.equal(one.tokens, other.tokens)


def test_a_right_kernel_passes_its_own_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for options in CHOICES:
            args = decoder(dtype, "gate", 5, eos=3, **options).steps[0]
            before = copied(args)
            pairs = list(triton_token._trial(args))
            assert len(pairs) == 5
            assert all(guards.close(got, expected, dtype) for got, expected in pairs)
            assert all(torch.equal(getattr(args, n), getattr(before, n)) for n in args.written)


def test_what_cannot_be_decoded_says_why() -> None:
    ids = torch.ones(1, 2, dtype=torch.int64)

    def reason(model: FusionLMForCausalLM, e: Tensor | None = None, **others: Any) -> str:
        inputs = {"prefix_embeds": e, **others}
        return str(obstacle(model, **inputs) or needs_host(model, **inputs))

    assert "fusion='input'" in reason(small_model(fusion="input"), torch.randn(1, 5))
    several = reason(small_model(fusion="add"), torch.randn(1, 2, 5))
    assert re.search(r"one embedding a sequence.*\[B, 5\]", several)
    model = small_model(fusion="none")
    assert reason(model) == "None"
    assert "it does not know labels" in reason(model, labels=ids)
    assert "training mode" in reason(model.train())
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        TokenGraph(decoder(torch.float32))
