"""A whole model with backend="triton", in Triton's interpreter, against the plain equations."""

import pytest
import torch
from conftest import small_model
from torch import Tensor

from fusion_model import FUSIONS, FusionLMForCausalLM

pytest.importorskip("triton")

from fusion_model.kernels.triton import lstm

IDS = [[1, 5, 9, 3, 7, 2], [1, 8, 4, 2, 0, 0]]


def both(fusion: str, **options: object) -> tuple[FusionLMForCausalLM, FusionLMForCausalLM]:
    reference = small_model(fusion=fusion, **options)
    kernels = small_model(fusion=fusion, **options)
    kernels.load_state_dict(reference.state_dict())
    reference.set_backend("reference")
    kernels.set_backend("triton")
    return reference, kernels


CASES = [(f, True) for f in FUSIONS] + [(f, False) for f in ("concat", "input", "init_both")]


@pytest.mark.parametrize(("fusion", "per_position"), CASES)
def test_logits_loss_and_gradients(fusion: str, per_position: bool) -> None:
    ids, mask = torch.tensor(IDS), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    e = torch.randn(2, 6, 5) if per_position else torch.randn(2, 5)
    prefix = None if fusion == "none" else e
    labels = torch.where(mask.bool(), ids, -100)
    results = []
    for model in both(fusion, num_layers=2):
        with torch.no_grad():
            plain = model(ids, mask, prefix).logits
        out = model(ids, mask, prefix, labels=labels)
        log_probs = model.token_log_probs(
            ids, prefix[:, :-1] if per_position and prefix is not None else prefix,
            torch.tensor([6, 4]),
        )  # fmt: skip
        (out.loss + log_probs.sum()).backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([plain, out.logits, out.loss, log_probs, *gradients])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_a_step_continues_a_sequence() -> None:
    reference, kernels = both("concat")
    ids, e = torch.tensor(IDS), torch.randn(2, 6, 5)
    with torch.no_grad():
        expected = reference(ids, prefix_embeds=e).logits
        first = kernels(ids[:, :4], prefix_embeds=e[:, :4])
        second = kernels(ids[:, 4:5], prefix_embeds=e[:, 4:5], state=first.state)
    torch.testing.assert_close(first.logits, expected[:, :4])
    torch.testing.assert_close(second.logits, expected[:, 4:5])


def test_the_gate_table_follows_the_weights() -> None:
    reference, kernels = both("none")
    ids = torch.tensor(IDS)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(kernels(ids).logits, reference(ids).logits)
            table = lstm._tables[kernels.embed_tokens.weight]
            assert kernels(ids) is not None
            assert lstm._tables[kernels.embed_tokens.weight] is table  # nothing was computed anew
            for model in (reference, kernels):
                model.embed_tokens.weight.mul_(-2)
                model.lstm.weight_hh_l0.add_(0.1)


def test_the_gate_table_follows_a_fused_optimiser() -> None:
    """It leaves the version of a weight as it was."""
    reference, kernels = both("none")
    ids = torch.tensor(IDS)
    optimizer = torch.optim.Adam(kernels.parameters(), lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            reference.load_state_dict(kernels.state_dict())
            torch.testing.assert_close(kernels(ids).logits, reference(ids).logits)
        kernels(ids, labels=ids).loss.backward()
        optimizer.step()


def test_a_vast_vocabulary_is_not_tabled(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, kernels = both("none")
    monkeypatch.setattr(lstm, "TABLE_BYTES", 10)
    monkeypatch.setattr(lstm, "gate_table", None)
    with torch.no_grad():
        logits: Tensor = kernels(torch.tensor(IDS)).logits
        torch.testing.assert_close(logits, reference(torch.tensor(IDS)).logits)


def test_generate() -> None:
    reference, kernels = both("add")
    ids, e = torch.tensor(IDS)[:, :3], torch.randn(2, 5)
    out = [
        model.generate(ids, prefix_embeds=e, max_new_tokens=5, num_beams=2, do_sample=False)
        for model in (reference, kernels)
    ]
    assert torch.equal(*out)
