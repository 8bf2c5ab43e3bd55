"""Training, evaluation with embeddings at hand, and the log-probability of targets.

Notation: B sequences, T tokens, N = B * T positions, D features, E prefix width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fusion_model.benchmarks.suite.cases import EAGER, Case
from fusion_model.benchmarks.suite.published_loop import PublishedLM
from fusion_model.benchmarks.suite.work import (
    TOLERANCE,
    Context,
    Work,
    check_backend,
    no_gradients,
    of_case,
)
from fusion_model.kernels import target_log_probs
from torch import Tensor, nn

from fusion_model.config import FusionLMConfig
from fusion_model.model import FusionLMForCausalLM

RATE = 1e-5  # the paper's


def head(case: Case, context: Context) -> Work:
    """log p of targets from features [N, D]."""
    torch.manual_seed(0)
    n, dtype, device = case.batch * case.length, getattr(torch, case.dtype), context.device
    layer = nn.Linear(case.embedding_size, case.vocab_size).to(device, dtype)
    x = torch.randn(n, case.embedding_size).to(device, dtype)
    targets = torch.randint(case.vocab_size, (n,)).to(device)
    weight, bias = layer.weight.detach(), layer.bias.detach()

    def plain() -> Tensor:
        return -F.cross_entropy(F.linear(x, weight, bias).float(), targets, reduction="none")

    if case.backend == "compile":
        torch._dynamo.reset()
    ours = partial(target_log_probs, x, weight, bias, targets)
    ways: dict[str, Callable[[], Tensor]] = {EAGER: plain, "compile": torch.compile(plain)}
    run = no_gradients(ways.get(case.backend, ours))

    def expected() -> Tensor:
        logits = F.linear(x.double(), weight.double(), bias.double())
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    return Work(run, run, expected, n, of_case(case), TOLERANCE[case.dtype])


class _Plain(nn.Module):
    """Late concatenation in plain PyTorch, with the weights of one of our models."""

    def __init__(self, ours: FusionLMForCausalLM) -> None:
        super().__init__()
        self.embedding, self.lstm = ours.embed_tokens, ours.lstm
        self.projection, self.output = ours.projection, ours.lm_head

    def nats(self, tokens: Tensor, e: Tensor) -> Tensor:
        """Surprisals [B * T] of tokens [B, T + 1], with e [B, T, E]."""
        hidden, _ = self.lstm(self.embedding(tokens[:, :-1]))
        logits = self.output(self.projection(torch.cat([hidden, e.to(hidden.dtype)], dim=-1)))
        targets = tokens[:, 1:].flatten()
        return F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")


def _published(ours: FusionLMForCausalLM, case: Case) -> PublishedLM:
    """The published model with the same function: its bias on the input is zero here."""
    model = PublishedLM(case.vocab_size, case.prefix_size, case.embedding_size, case.hidden_size)
    with torch.no_grad():
        model.embedding.weight.copy_(ours.embed_tokens.weight.t())
        model.embedding.bias.zero_()
    model.lstm, model.projection, model.output = ours.lstm, ours.projection, ours.lm_head
    return model.to(ours.device)


def at_hand(case: Case, context: Context) -> Work:
    """`training`: forward, backward and Adam; `evaluation`: surprisals. Of B sentences of T
    predictions, embeddings at hand, with the same weights in each way."""
    torch.manual_seed(0)
    device, trains = context.device, case.operation == "training"
    sizes = ("vocab_size", "embedding_size", "hidden_size", "prefix_size")
    config = FusionLMConfig(fusion="concat", **{name: getattr(case, name) for name in sizes})
    model = FusionLMForCausalLM(config).to(device).train(trains)  # type: ignore[arg-type]
    tokens = torch.randint(3, case.vocab_size, (case.batch, case.length + 1)).to(device)
    e = torch.randn(case.batch, case.length, case.prefix_size).to(device)
    dtype, kind = getattr(torch, case.dtype), torch.device(device).type
    network: Any = model

    def nats() -> Tensor:
        if isinstance(network, _Plain):
            return network.nats(tokens, e)
        if network is model:
            return -model.token_log_probs(tokens, e)
        rows = zip(tokens, e, strict=True)
        return torch.cat([F.cross_entropy(network(r, v), r[1:], reduction="none") for r, v in rows])

    if case.backend == EAGER:
        network = _Plain(model)
    elif case.backend == "published":
        network = _published(model, case)
    else:
        check_backend(case.backend, device)
        model.set_backend(case.backend)

    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)

    def surprisals() -> Tensor:
        with torch.autocast(kind, dtype, enabled=case.dtype != "float32"):
            return nats().float()

    def gradients() -> Tensor:
        optimizer.zero_grad()
        loss = surprisals().mean()
        loss.backward()
        return loss

    def step() -> None:
        gradients()
        optimizer.step()

    def with_gradient(loss: Tensor, lstm: Any) -> Tensor:
        """Loss, and the gradient of the recurrent weights, which everything passes through."""
        gradient = lstm.weight_hh_l0.grad.flatten() * case.batch
        return torch.cat([loss.detach().view(1), gradient]).double()

    def expected() -> Tensor:
        copy = FusionLMForCausalLM(config)
        copy.load_state_dict(model.state_dict())
        plain = _Plain(copy).double()
        exact = plain.nats(tokens.cpu(), e.double().cpu())
        if not trains:
            return exact.detach()
        exact.mean().backward()
        return with_gradient(exact.mean(), copy.lstm)

    evaluate = no_gradients(surprisals)
    return Work(
        step if trains else evaluate,
        (lambda: with_gradient(gradients(), model.lstm)) if trains else evaluate,
        expected,
        case.batch * case.length,
        of_case(case),
        TOLERANCE[case.dtype],
    )
