"""The nine fusions against a float64 computation of their own, and what transformers expects."""

import numpy as np
import pytest
import torch
from conftest import small_model
from oracle import all_logits
from transformers import AutoConfig, AutoModelForCausalLM

from fusion_model import FUSIONS, FusionLMConfig, FusionLMForCausalLM

FUSED = [f for f in FUSIONS if f != "none"]
EARLY = ("init_hidden", "init_cell", "init_both")


def inputs(length: int = 6, batch: int = 2, dtype: torch.dtype = torch.float64):
    ids = torch.randint(3, 30, (batch, length))
    return ids, torch.randn(batch, length, 5, dtype=dtype)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("prefix_size", [5, 8], ids=["projected", "same-width"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_is_the_papers(fusion: str, prefix_size: int, layers: int) -> None:
    model = small_model(fusion=fusion, prefix_size=prefix_size, num_layers=layers).double()
    projects = fusion in ("add", "multiply", "gate", *EARLY) and prefix_size != 8
    assert ("prefix_projection.weight" in model.state_dict()) == projects
    ids = torch.randint(3, 30, (2, 6))
    e = torch.randn(2, 6, prefix_size, dtype=torch.float64)
    per_sequence = e[:, 0]
    for given in (e, per_sequence):
        got = model(ids, prefix_embeds=given).logits
        for row in range(2):
            vectors = None if fusion == "none" else given[row].numpy()
            expected = all_logits(model, ids[row].tolist(), vectors)
            np.testing.assert_allclose(got[row].detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_future_reaches_nothing(fusion: str) -> None:
    model, (ids, e) = small_model(fusion=fusion).double(), inputs()
    before = model(ids, prefix_embeds=e).logits
    for t in range(5):
        changed_ids, changed_e = ids.clone(), e.clone()
        changed_ids[:, t + 1 :] = (ids[:, t + 1 :] + 1) % 27 + 3
        changed_e[:, t + 1 :] += 1
        after = model(changed_ids, prefix_embeds=changed_e).logits
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert not torch.equal(after[:, t + 1 :], before[:, t + 1 :])


@pytest.mark.parametrize("fusion", FUSED)
def test_the_embedding_of_each_position_counts(fusion: str) -> None:
    model, (ids, e) = small_model(fusion=fusion).double(), inputs()
    before = model(ids, prefix_embeds=e).logits
    e[:, 3] += 1
    after = model(ids, prefix_embeds=e).logits
    changed = (after - before).abs().amax(dim=(0, 2)) > 1e-9
    later = fusion == "input"  # goes through the recurrence; all others act at their position
    assert changed.tolist() == [False, False, False, True, later, later]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients(fusion: str) -> None:
    model = small_model(fusion=fusion, vocab_size=7, num_layers=2).double()
    ids = torch.randint(7, (2, 3))
    e = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in model.named_parameters()]

    def loss(e, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, values, (ids,), {"prefix_embeds": e}).logits

    parameters = tuple(p for _, p in model.named_parameters())
    model.set_backend("reference")
    assert torch.autograd.gradcheck(loss, (e, *parameters), fast_mode=True)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_step_by_step_equals_the_sequence(fusion: str, layers: int) -> None:
    model, (ids, e) = small_model(fusion=fusion, num_layers=layers).double(), inputs(7)
    for given in (e, e[:, 0]):
        whole = model(ids, prefix_embeds=given).logits
        state, pieces, start = None, [], 0
        for size in (1, 2, 1, 3):
            part = given if given.dim() == 2 else given[:, start : start + size]
            out = model(ids[:, start : start + size], prefix_embeds=part, state=state)
            state, start = out.state, start + size
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_padding_on_either_side_changes_nothing(fusion: str, side: str) -> None:
    model, (ids, e) = small_model(fusion=fusion).double(), inputs(6, 1)
    pad = torch.zeros(1, 3, dtype=torch.long)
    junk = torch.randn(1, 3, 5, dtype=torch.float64)
    order = (lambda a, b: [a, b]) if side == "left" else (lambda a, b: [b, a])
    padded = torch.cat(order(pad, ids), 1)
    mask = torch.cat(order(torch.zeros(1, 3), torch.ones(1, 6)), 1).long()
    embeds = torch.cat(order(junk, e), 1)
    expected = model(ids, prefix_embeds=e)
    for use_cache in (True, False):
        got = model(padded, attention_mask=mask, prefix_embeds=embeds, use_cache=use_cache)
        torch.testing.assert_close(got.logits[:, mask[0].bool()], expected.logits)
    # The state goes on as if there had been no padding.
    got = model(padded, attention_mask=mask, prefix_embeds=embeds)
    nxt = ids[:, :1]
    grown = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
    a = model(nxt, attention_mask=grown, prefix_embeds=e[:, :1], state=got.state).logits
    b = model(nxt, prefix_embeds=e[:, :1], state=expected.state).logits
    torch.testing.assert_close(a, b)


class ToyEncoder:
    """A prefix encoder whose vectors depend on every token of the prefix, padding aside."""

    def __init__(self) -> None:
        self.table = torch.randn(30, 5, generator=torch.Generator().manual_seed(5)).double()

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, start: int) -> torch.Tensor:
        vectors = self.table[ids] * mask[..., None]
        weights = mask.cumsum(1)[..., None] + 1.0
        return torch.tanh((vectors * weights).cumsum(1))[:, start:]


GENERATION = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.3, "top_k": 10},
    "beam": {"do_sample": False, "num_beams": 3},
    "sampled beam": {"do_sample": True, "num_beams": 3},
}


@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("per_sequence", [False, True])
def test_generate_is_the_same_without_state(fusion: str, how: str, per_sequence: bool) -> None:
    model = small_model(fusion=fusion).double()
    model.prefix_encoder = ToyEncoder()
    ids, e = inputs(4, 3)
    extra = {"prefix_embeds": e[:, 0]} if per_sequence else {}
    results = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        results.append(
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=8,
                use_cache=use_cache,
                pad_token_id=0,
                **GENERATION[how],
                **extra,
            )
        )
    assert torch.equal(*results)
    assert results[0].shape[1] > 4


@pytest.mark.parametrize("fusion", ["none", "concat", "init_both", "input"])
def test_greedy_generation_is_argmax_one_prefix_at_a_time(fusion: str) -> None:
    model, encoder = small_model(fusion=fusion).double(), ToyEncoder()
    model.prefix_encoder = encoder
    ids = torch.randint(3, 30, (1, 3))
    model.generation_config.eos_token_id = None
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
    )
    tokens = ids[0].tolist()
    for _ in range(6):
        now = torch.tensor([tokens])
        e = encoder(now, torch.ones_like(now), 0)[0].numpy()
        tokens.append(int(all_logits(model, tokens, e)[-1].argmax()))
    assert out[0].tolist() == tokens


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("how", ["greedy", "beam"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_padded_batch_generates_what_each_row_does_alone(fusion: str, how: str, side: str) -> None:
    model = small_model(fusion=fusion).double()
    model.prefix_encoder = ToyEncoder()
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 5, "pad_token_id": 0, **GENERATION[how]}
    rows = [torch.randint(3, 30, (n,)) for n in (2, 5)]

    def pad(row: torch.Tensor) -> torch.Tensor:
        amount = (5 - len(row), 0) if side == "left" else (0, 5 - len(row))
        return torch.nn.functional.pad(row, amount)

    padded = torch.stack([pad(r) for r in rows])
    mask = torch.stack([pad(torch.ones_like(r)) for r in rows])
    together = model.generate(padded, attention_mask=mask, **options)
    for row, tokens in enumerate(rows):
        alone = model.generate(tokens[None], attention_mask=torch.ones(1, len(tokens)), **options)
        assert together[row, 5:].tolist() == alone[0, len(tokens) :].tolist()


def test_labels_give_the_mean_loss() -> None:
    model, (ids, e) = small_model().double(), inputs()
    labels = ids.clone()
    labels[0, 3:] = -100
    out = model(ids, prefix_embeds=e, labels=labels)
    log_probs = torch.log_softmax(out.logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    kept = torch.cat([log_probs[0, :2], log_probs[1]])
    torch.testing.assert_close(out.loss.double(), -kept.mean(), atol=1e-6, rtol=0)


def test_token_log_probs_leave_padding_out() -> None:
    model, (ids, e) = small_model().double(), inputs()
    lengths = torch.tensor([3, 6])
    got = model.token_log_probs(ids, e[:, :-1], lengths)
    logits = model(ids, prefix_embeds=e).logits
    wide = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(got, torch.cat([wide[0, :2], wide[1]]))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("tie", [False, True])
def test_saved_and_loaded_it_is_the_same(fusion: str, tie: bool, tmp_path) -> None:
    model, (ids, e) = small_model(fusion=fusion, tie_weights=tie), inputs(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, FusionLMForCausalLM)
    assert (again.lm_head.weight is again.embed_tokens.weight) == tie
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    assert torch.equal(again(ids, prefix_embeds=e).logits, model(ids, prefix_embeds=e).logits)


def test_lstm_parameters_are_those_of_torch() -> None:
    model = small_model(num_layers=2)
    reference = torch.nn.LSTM(6, 8, 2, batch_first=True)
    assert [n for n, _ in model.lstm.named_parameters()] == [
        n for n, _ in reference.named_parameters()
    ]
    reference.load_state_dict(model.lstm.state_dict())


def test_wrong_embeddings_are_named() -> None:
    model, (ids, e) = small_model(), inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"needs prefix_embeds, \[B, T, 5\] or \[B, 5\]"):
        model(ids)
    with pytest.raises(ValueError, match=r"shape \[2, 5, 5\]: expected \[2, 6, 5\]"):
        model(ids, prefix_embeds=e[:, :-1])
    with pytest.raises(ValueError, match=r"shape \[2, 6, 4\]"):
        model(ids, prefix_embeds=e[..., :-1])
    e[1, 2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinity, first at \[1, 2, 3\]"):
        model(ids, prefix_embeds=e)
    with pytest.raises(ValueError, match="needs an encoder for the prefixes"):
        model.generate(ids, max_new_tokens=1)
    with pytest.raises(ValueError, match="unknown backend"):
        model.set_backend("cuda")


def test_states_of_early_fusion_are_not_mixed_up() -> None:
    model, (ids, e) = small_model(fusion="init_both"), inputs(dtype=torch.float32)
    rows = model(ids, prefix_embeds=e).state
    single = model(ids, prefix_embeds=e[:, 0]).state
    with pytest.raises(ValueError, match=r"comes from prefix_embeds \[B, T, E\]"):
        model(ids, prefix_embeds=e[:, 0], state=rows)
    with pytest.raises(ValueError, match=r"comes from prefix_embeds \[B, E\]"):
        model(ids, prefix_embeds=e, state=single)


@pytest.mark.parametrize(
    ("field", "message"),
    [({"fusion": "concatenate"}, "unknown fusion 'concatenate': choose one of none, concat"),
     ({"hidden_size": 0}, "hidden_size must be at least 1 and")],
)  # fmt: skip
def test_bad_configuration_is_named(field: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusionLMConfig(**field)
