"""Tokens by CUDA graphs of many and of one, with a recorder that stands in for CUDA's."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import small_model
from torch import Tensor, nn

pytest.importorskip("triton")

from fusion_model.kernels.triton import decoder as triton_token
from fusion_model.kernels.triton.decode_naive import Token, plain_token
from fusion_model.kernels.triton.decoder import TOKENS, Decoder, DecodeWeights, TokenGraph

from fusion_model import decoding
from fusion_model.decoding import Choice


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each graph held that was replayed: here four, or one."""
    found: list[int] = []
    recorded: list[Token] = []

    def decode_token(args: Token) -> Tensor:
        recorded.append(args)
        return plain_token(args)

    def record(run: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        for _ in range(2):
            run()
        recorded.clear()
        out, held = run(), list(recorded)

        def replay() -> None:
            found.append(len(held))
            for args in held:
                logits = plain_token(args)
            out.copy_(logits)

        return SimpleNamespace(replay=replay), out

    for name, value in {
        "TOKENS": 4, "record": record, "decode_token": decode_token, "on": lambda _: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(triton_token, name, value)
    return found


def graph_of(one: Decoder) -> TokenGraph:
    """As on a CUDA device."""
    done, one.done = one.done, SimpleNamespace(device=torch.device("cuda"))  # type: ignore[assignment]
    graph = TokenGraph(one)
    one.done = done
    return graph


def decoder() -> tuple[Decoder, Callable[[], None]]:
    """Of two layers, sampling, and what puts it into the middle of a sequence."""
    torch.manual_seed(0)
    weights = DecodeWeights(
        torch.randn(50, 7), nn.LSTM(7, 20, 2).all_weights,
        torch.randn(9, 20), torch.randn(50, 9), torch.randn(50),
    )  # fmt: skip
    one = Decoder(weights, 3, 16, greedy=False, eos=11, pad=2)
    ids, state = torch.tensor([3, 4, 5]), torch.randn(2, 3, 2, 20)
    return one, lambda: one.start(ids, *state, seed=3, temperature=0.7)


@pytest.mark.parametrize(
    ("split", "graphs"),
    [
        ((11,), [4, 4, 1, 1, 1]),
        ((1, 10), [1, 1, 4, 4, 1]),
        ((4, 3, 4), [4, 1, 1, 1, 1, 1, 1, 1]),
        ((2, 8, 1), [1, 1, 4, 4, 1]),
    ],
    ids=str,
)
def test_any_split_into_graphs_gives_the_same(
    split: tuple[int, ...], graphs: list[int], replayed: list[int]
) -> None:
    expected, start = decoder()
    start()
    for _ in range(11):
        expected.step()
    wanted = (expected.logits, expected.tokens[:11], expected.done, *expected.state())
    one, start = decoder()
    graph = graph_of(one)
    for _ in range(2):
        start()
        for count in split:
            assert graph.run(count) is one.logits
        got = (one.logits, one.tokens[:11], one.done, *one.state())
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert replayed == graphs * 2
    assert TOKENS % 2 == 0


@pytest.mark.parametrize("last", [None, 2, 6, 9])
def test_generation_by_graphs(
    last: int | None, replayed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph of many tokens between two looks at the end; the same tokens as without graphs."""
    monkeypatch.setattr(triton_token, "TokenGraph", graph_of)
    monkeypatch.setattr(decoding, "LOOK", 4)
    model = small_model(fusion="none", vocab_size=40, initializer_range=2.0)
    ids = torch.tensor([[3, 4, 5]])
    plain = decoding.decode(model, ids, None, 10, Choice(), graph=False)
    eos = -1 if last is None else int(plain[0, 3 + last])
    long = 10 if last is None else plain[0, 3:].tolist().index(eos) + 1
    by_graphs = decoding.decode(model, ids, None, 10, Choice(eos=eos))
    assert torch.equal(by_graphs, plain[:, : 3 + long])
    assert replayed == ([4] * -(-long // 4) if long <= 8 else [4, 4, 1, 1])
