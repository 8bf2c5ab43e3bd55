"""The training step and the log-probability of targets, with each backend.

Notation: B sequences, T tokens, N = B * T positions, D features, E prefix width, V vocabulary.
"""

from collections.abc import Callable
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

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(x, weight, bias).float(), targets, reduction="none")

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return target_log_probs(x, weight, bias, targets)

    if case.backend == "compile":
        torch._dynamo.reset()
    way = {EAGER: plain, "compile": torch.compile(plain)}.get(case.backend, ours)
    run = no_gradients(lambda: way(x, weight, bias))

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

    def loss(self, tokens: Tensor, e: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(tokens[:, :-1]))
        logits = self.output(self.projection(torch.cat([hidden, e.to(hidden.dtype)], dim=-1)))
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _published(ours: FusionLMForCausalLM, case: Case) -> PublishedLM:
    """The published model with the same function: its bias on the input is zero here."""
    model = PublishedLM(case.vocab_size, case.prefix_size, case.embedding_size, case.hidden_size)
    with torch.no_grad():
        model.embedding.weight.copy_(ours.embed_tokens.weight.t())
        model.embedding.bias.zero_()
    model.lstm, model.projection, model.output = ours.lstm, ours.projection, ours.lm_head
    return model.to(ours.device)


def training(case: Case, context: Context) -> Work:
    """Forward, backward and Adam on B sentences of T predictions, embeddings at hand."""
    torch.manual_seed(0)
    device = context.device
    sizes = ("vocab_size", "embedding_size", "hidden_size", "prefix_size")
    config = FusionLMConfig(fusion="concat", **{name: getattr(case, name) for name in sizes})
    model = FusionLMForCausalLM(config).to(device).train()  # type: ignore[arg-type]
    tokens = torch.randint(3, case.vocab_size, (case.batch, case.length + 1)).to(device)
    e = torch.randn(case.batch, case.length, case.prefix_size).to(device)
    dtype, kind = getattr(torch, case.dtype), torch.device(device).type

    losses: dict[str, Callable[[], Tensor]] = {
        EAGER: lambda: _Plain(model).loss(tokens, e),
        "published": lambda: published_loss(),
    }
    parameters = list(model.parameters())
    if case.backend == "published":
        published = _published(model, case)
        parameters = list(published.parameters())

        def published_loss() -> Tensor:
            rows = zip(tokens, e, strict=True)
            return torch.stack([F.cross_entropy(published(r, v), r[1:]) for r, v in rows]).mean()

    elif case.backend != EAGER:
        check_backend(case.backend, device)
        model.set_backend(case.backend)
    loss_of = losses.get(case.backend, lambda: -model.token_log_probs(tokens, e).mean())
    optimizer = torch.optim.Adam(parameters, lr=RATE)

    def gradients() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(kind, dtype, enabled=case.dtype != "float32"):
            loss = loss_of()
        loss.backward()
        return loss

    def run() -> None:
        gradients()
        optimizer.step()

    def result() -> Tensor:
        """Loss, and the gradient of the recurrent weights, which everything passes through."""
        loss = gradients().detach()
        gradient = model.lstm.weight_hh_l0.grad
        assert gradient is not None
        return torch.cat([loss.float().view(1), gradient.float().flatten() * case.batch])

    def expected() -> Tensor:
        copy = FusionLMForCausalLM(config)
        copy.load_state_dict(model.state_dict())
        plain = _Plain(copy)
        plain.double()
        loss = plain.loss(tokens.cpu(), e.double().cpu())
        loss.backward()
        gradient: Any = copy.lstm.weight_hh_l0.grad
        return torch.cat([loss.detach().view(1), gradient.flatten() * case.batch])

    count = case.batch * case.length
    return Work(run, result, expected, count, of_case(case), TOLERANCE[case.dtype])
