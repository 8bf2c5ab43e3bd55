"""`generate` on the device, in Triton's interpreter: when, and that nothing else changes."""

from typing import Any

import pytest
import torch
from conftest import small_model
from torch import Tensor
from transformers import LogitsProcessorList, MinLengthLogitsProcessor

from fusion_model import FusionLMForCausalLM

pytest.importorskip("triton")

from fusion_model import decoding as device_generation


def model_of(fusion: str, backend: str = "triton", **options: object) -> FusionLMForCausalLM:
    torch.manual_seed(1)
    model = small_model(fusion=fusion, vocab_size=40, initializer_range=2.0, **options)
    with torch.no_grad():  # so that tokens vary
        for weights in model.lstm.parameters():
            weights.mul_(4)
    model.set_backend(backend)
    return model


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each call that was decoded on the device."""
    calls = []
    decode = device_generation.decode

    def noting(*args: Any, **options: Any) -> Tensor:
        calls.append(args[4])
        return decode(*args, **options)

    monkeypatch.setattr(device_generation, "decode", noting)
    return calls


class Collected:
    """A streamer."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("fusion", ["none", "concat", "add", "multiply", "gate", "init_both"])
@pytest.mark.parametrize("layers", [1, 2])
def test_greedy_is_that_of_the_ordinary_path(fusion: str, layers: int, served: list[Any]) -> None:
    ids, e = torch.randint(3, 40, (3, 4)), torch.randn(3, 5) * 2
    options = {"max_new_tokens": 12, "do_sample": False}
    if fusion != "none":
        options["prefix_embeds"] = e
    outputs = []
    for backend in ("reference", "triton"):
        model = model_of(fusion, backend, num_layers=layers)
        outputs.append(model.generate(ids, **options))
    assert len(served) == 1
    assert torch.equal(*outputs)


@pytest.mark.parametrize("batch", [1, 4])
def test_sequences_end_as_on_the_ordinary_path(
    batch: int, served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At different lengths, padded from there on, and no longer than the longest."""
    monkeypatch.setattr(device_generation, "LOOK", 3)
    ids = torch.randint(3, 40, (batch, 2))
    plain = model_of("none", "reference").generate(ids, max_new_tokens=30, do_sample=False)
    tokens = list(dict.fromkeys(plain[0, 2:].tolist()))[:5]  # some that do come up
    lengths = set()
    for eos in tokens:
        outputs, streams = [], []
        for backend in ("reference", "triton"):
            model, streamer = model_of("none", backend), Collected()
            ends = {"eos_token_id": eos, "pad_token_id": 1, "do_sample": False}
            outputs.append(model.generate(ids, max_new_tokens=30, **ends))
            streamed = model.generate(ids, max_new_tokens=30, streamer=streamer, **ends)
            assert torch.equal(streamed, outputs[-1])
            streams.append((streamer.given, streamer.ended))
        assert torch.equal(*outputs)
        assert streams[0] == streams[1]
        lengths.add(outputs[0].shape[1])
    assert len(lengths) > 1
    assert len(served) == 2 * len(tokens)


def test_samples(served: list[Any]) -> None:
    """Repeatable by the seed; of the k likeliest; of the distribution that the model has."""
    model = model_of("none")
    ids = torch.tensor([[3, 4]]).expand(200, -1)
    sampling: dict[str, Any] = {"do_sample": True, "max_new_tokens": 1, "temperature": 2.0}

    def drawn(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(ids, **(sampling | options))[:, -1]

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
    with torch.no_grad():
        logits = model(ids[:1]).logits[0, -1]
    assert set(drawn(0, top_k=3).tolist()) <= set(logits.topk(3).indices.tolist())
    frequency = torch.bincount(drawn(0, top_k=0), minlength=40) / 200
    assert (frequency - torch.softmax(logits / 2, -1)).abs().max() < 0.12
    assert [c.top_k for c in served] == [50, 50, 50, 50, 3, 0]
    assert {c.temperature for c in served} == {2.0}


def test_some_sequences_of_a_prompt(served: list[Any]) -> None:
    options = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 8}
    out = model_of("add").generate(
        torch.tensor([[3, 4], [5, 6]]), prefix_embeds=torch.randn(2, 5), **options
    )
    assert out.shape == (6, 10)
    assert len(served) == 1
    assert out[:, :2].tolist() == [[3, 4]] * 3 + [[5, 6]] * 3


IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])
ORDINARY: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2},
    "penalty": {"repetition_penalty": 1.3},
    "nucleus": {"do_sample": True, "top_p": 0.5},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "padding": {"attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])},
    "two ends": {"eos_token_id": [1, 2]},
    "at least": {"min_new_tokens": 2},
    "processor": {
        "logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(9, 2, device="cpu")])
    },
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("name", ORDINARY)
def test_all_else_takes_the_ordinary_path(name: str, served: list[Any]) -> None:
    options = {"max_new_tokens": 4, "do_sample": False} | ORDINARY[name]
    outputs = []
    for backend in ("reference", "triton"):
        torch.manual_seed(0)
        found = model_of("none", backend).generate(IDS, **options)
        outputs.append(found if isinstance(found, Tensor) else found.sequences)
    assert not served
    assert torch.equal(*outputs)


def test_a_prefix_that_grows_takes_the_ordinary_path(served: list[Any]) -> None:
    outputs = []
    for backend in ("reference", "triton"):
        model = model_of("concat", backend)
        model.prefix_encoder = lambda ids, mask, start: (
            ids[:, start:, None].float() % torch.arange(2, 7)
        )
        outputs.append(model.generate(IDS, max_new_tokens=4, do_sample=False))
    assert not served
    assert torch.equal(*outputs)


def test_other_backends_and_autocast_take_the_ordinary_path(served: list[Any]) -> None:
    for backend in ("auto", "torch", "reference"):
        model_of("none", backend).generate(IDS, max_new_tokens=2)
    with torch.autocast("cpu", torch.bfloat16):
        model_of("none", "reference").generate(IDS, max_new_tokens=2)
    assert not served


def test_the_decoder_is_kept_while_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion_model.kernels.triton import decoder as triton_token

    made = []
    decoder = triton_token.Decoder
    monkeypatch.setattr(triton_token, "Decoder", lambda *a, **k: made.append(1) or decoder(*a, **k))
    model = model_of("add")
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5}
    e = torch.randn(2, 2, 5)
    with torch.inference_mode():
        first = model.generate(IDS, prefix_embeds=e[0], **options)
    other = model.generate(IDS, prefix_embeds=e[1] * 9, **options)
    assert torch.equal(first, model.generate(IDS, prefix_embeds=e[0], **options))
    assert not torch.equal(first, other)
    assert len(made) == 1
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert not torch.equal(first, model.generate(IDS, prefix_embeds=e[0], **options))
    model.generate(IDS[:1], prefix_embeds=e[0, :1], **options)
    assert len(made) == 3
