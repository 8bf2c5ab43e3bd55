"""Training, evaluation with embeddings at hand, and the log-probability of targets.

Notation: B sequences, T tokens, N = B * T positions, D features, E prefix width, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fusion_model.benchmarks.suite.cases import EAGER, Case
from fusion_model.benchmarks.suite.work import (
    TOLERANCE,
    Context,
    Work,
    check_backend,
    compiled,
    of_case,
)
from fusion_model.kernels import target_log_probs
from torch import Tensor, nn

from fusion_model.config import FusionLMConfig
from fusion_model.fusion import scaled
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

    ours = partial(target_log_probs, x, weight, bias, targets)
    ways: dict[str, Callable[[], Tensor]] = {EAGER: plain, "compile": compiled(plain)}
    run = torch.inference_mode()(ways.get(case.backend, ours))

    def expected() -> Tensor:
        logits = F.linear(x.double(), weight.double(), bias.double())
        return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    return Work(run, run, expected, n, of_case(case), TOLERANCE[case.dtype])


class _Plain(nn.Module):
    """Late concatenation in plain PyTorch, with the weights of one of our models."""

    def __init__(self, ours: FusionLMForCausalLM) -> None:
        super().__init__()
        self.embedding: nn.Module = ours.embed_tokens
        self.lstm, self.scale = ours.lstm, ours.prefix_scale
        self.projection, self.output = ours.projection, ours.lm_head

    def nats(self, tokens: Tensor, e: Tensor) -> Tensor:
        """Surprisals [B * T] of tokens [B, T + 1], with e [B, T, E]."""
        hidden, _ = self.lstm(self.embedding(tokens[:, :-1]))
        e = scaled(e.to(hidden.dtype), self.scale)
        logits = self.output(self.projection(torch.cat([hidden, e], dim=-1)))
        targets = tokens[:, 1:].flatten()
        return F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")


class _Published(_Plain):
    """The published code's way, rewritten plainly: a sentence a step; every prefix of it a row of
    its own, one-hot, padded to the sentence's length, read from the start (arXiv 2208.02402)."""

    def __init__(self, ours: FusionLMForCausalLM) -> None:
        super().__init__(ours)
        config = ours.config
        one_hot = nn.Linear(config.vocab_size, config.embedding_size).to(ours.device)
        with torch.no_grad():
            one_hot.weight.copy_(ours.embed_tokens.weight.t())
            one_hot.bias.zero_()  # theirs is learned: here the function is ours
        self.embedding = one_hot

    def nats(self, tokens: Tensor, e: Tensor) -> Tensor:
        return torch.cat([self._sentence(*pair) for pair in zip(tokens, e, strict=True)])

    def _sentence(self, tokens: Tensor, e: Tensor) -> Tensor:
        """Surprisals [n] of tokens [n + 1], with e [n, E]."""
        n, width = len(tokens) - 1, self.output.out_features
        rows = torch.zeros(n, n, width, device=tokens.device)
        for i in range(n):
            rows[i, : i + 1] = F.one_hot(tokens[: i + 1], width)
        hidden, _ = self.lstm(self.embedding(rows))
        last = hidden[torch.arange(n), torch.arange(n)]
        logits = self.output(self.projection(torch.cat([last, scaled(e, self.scale)], dim=1)))
        return F.cross_entropy(logits, tokens[1:], reduction="none")


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
    ours = case.backend not in (EAGER, "published")
    network: Any = model

    def nats() -> Tensor:
        found: Tensor = -model.token_log_probs(tokens, e) if ours else network.nats(tokens, e)
        return found

    if case.backend == EAGER:
        network = _Plain(model)
    elif case.backend == "published":
        network = _Published(model)
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

    evaluate = torch.inference_mode()(surprisals)
    return Work(
        step if trains else evaluate,
        (lambda: with_gradient(gradients(), model.lstm)) if trains else evaluate,
        expected,
        case.batch * case.length,
        of_case(case),
        TOLERANCE[case.dtype],
    )
