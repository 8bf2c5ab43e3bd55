"""What the encoder's passes are made of, each against a plain form of it: linear layers, attention
in buckets, trees, and a stream's cache."""

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES

from fusion_model.data.tokenizer import cut_vocabulary, train_bpe
from fusion_model.encoders import linear as packed_linear
from fusion_model.encoders import load_encoder
from fusion_model.encoders.incremental.attention import TreeAttention, similar, width_of
from fusion_model.encoders.incremental.cache import WORD, Entry, TextCache
from fusion_model.encoders.incremental.trees import Query, Tree
from fusion_model.encoders.linear import Linear, packed
from fusion_model.encoders.pretrained import counted_tokens
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.prefixes.stream import PrefixStream

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def small_bpe():
    """Few merges, so that prefixes end inside words."""
    return train_bpe(SENTENCES, 280)


@pytest.mark.parametrize("kind", ["packed", "plain"])
@pytest.mark.parametrize("after", ["nothing", "gelu", "relu", "sum", "gelu and sum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_layers(dtype: torch.dtype, after: str, kind: str, monkeypatch) -> None:
    if kind == "plain":
        monkeypatch.setattr(packed_linear, "packed", lambda weight: None)
    weight, bias = torch.randn(24, 16, dtype=dtype), torch.randn(24, dtype=dtype)
    activation = {"gelu": F.gelu, "relu": F.relu}.get(after.split()[0])
    linear = Linear(weight, bias, activation, is_gelu=after.startswith("gelu"))
    for rows in (1, 3, 70):
        x, residual = torch.randn(rows, 16, dtype=dtype), torch.randn(rows, 24, dtype=dtype)
        before = residual.clone()
        expected = x.double() @ weight.double().T + bias.double()
        if activation is not None:
            expected = activation(expected)
        if after.endswith("sum"):
            expected += residual.double()
        found = linear(x, residual if after.endswith("sum") else None)
        assert found.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(found.double(), expected, atol=4 * tolerance, rtol=tolerance)
        assert torch.equal(residual, before)


def test_a_packing_that_computes_wrong_is_not_used(monkeypatch) -> None:
    weight = torch.randn(24, 16)
    if packed(weight) is None:
        pytest.skip("this build of PyTorch has no packed layers")
    real = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda w, m: real(w + 1e-3, m))
    assert packed(weight) is None
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    with pytest.raises(TypeError):
        packed(weight)


class Positions:
    """All that `TreeAttention` needs of an encoder."""

    heads, device, dtype = 2, torch.device("cpu"), torch.float32

    def __init__(self, relative: bool) -> None:
        self._bias = torch.randn(400, 2) if relative else None

    def position_bias(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        if self._bias is None:
            return None
        return self._bias[200 + keys[:, None, :] - queries[:, :, None]].permute(0, 3, 1, 2)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("branches", [0, 2])
@pytest.mark.parametrize("sizes", [[3], [40, 39, 17, 16, 15, 2, 2], [70, 3], [2, 2, 9]], ids=str)
def test_attention_in_buckets(sizes: list[int], branches: int, relative: bool) -> None:
    layers, trees = Positions(relative), []
    for size in sizes:
        tree = Tree([1] * size, [], size - 1)
        for tail in [[]] + [[5, 6, 7 + i] for i in range(branches)]:
            assert tree.add(tail)
        trees.append(tree.flat({"cls": Query(1, True, 0)}, 1))
    starts = [sum(len(t.tokens) for t in trees[:i]) for i in range(len(trees))]
    count = sum(len(tree.tokens) for tree in trees)
    at = torch.tensor([place for tree in trees for place in tree.positions])
    rows = torch.tensor([s + n for s, t in zip(starts, trees, strict=True) for n in t.nodes["cls"]])
    query, key, value = (torch.randn(count + 5, 2, 8) for _ in range(3))
    attend = TreeAttention(trees, at, layers, rows.numpy())
    seen = torch.stack([key, value], dim=1)
    found, means = attend(0, query, seen), attend.mean(0, key.flatten(1))
    few = attend(1, query[rows], seen)
    expected_means = []
    for start, tree in zip(starts, trees, strict=True):
        own = slice(start, start + len(tree.tokens))
        q, k, v = (part[own].transpose(0, 1) for part in (query, key, value))
        scores = q @ k.transpose(1, 2) / 8**0.5
        if relative:
            scores += layers.position_bias(at[own][None], at[own][None])[0]
        sees = torch.from_numpy(tree.sees)
        expected = (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ v).transpose(0, 1)
        torch.testing.assert_close(found[own], expected, atol=1e-5, rtol=1e-5)
        expected_means += [key[own].flatten(1)[sees[node]].mean(0) for node in tree.nodes["mean"]]
    torch.testing.assert_close(few, found[rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(means, torch.stack(expected_means), atol=1e-5, rtol=1e-5)
    assert not found[count:].any()


def test_little_of_a_bucket_is_padding() -> None:
    sizes = sorted((random.Random(0).randrange(1, 300) for _ in range(200)), reverse=True)
    groups = similar(sizes)
    assert [a for a, _ in groups[1:]] == [b for _, b in groups[:-1]]
    assert (groups[0][0], groups[-1][1]) == (0, len(sizes))
    for first, end in groups:
        width = width_of(sizes[first])
        assert all(size <= width for size in sizes[first:end])
        assert all(width_of(size) >= 0.75 * width for size in sizes[first:end])
    assert len(groups) < 12
    assert similar([]) == []
    assert similar([3, 80, 80, 5]) == [(0, 1), (1, 3), (3, 4)]


def entry(tail: list[int]) -> Entry:
    """With as many nodes as tokens, each holding its number."""
    count = 2 + len(tail)
    states = torch.arange(float(count)).expand(4, count)[..., None, None].clone()
    return Entry([1, 2], tail, states, torch.arange(float(count))[:, None, None])


def test_a_text_goes_on_and_a_fork_copies() -> None:
    cache = TextCache(torch.zeros(4, 0, 1, 1), torch.zeros(0, 1, 1))
    assert cache.find([1, 2], []) == (None, -1)
    first, second = entry([5, 6, 7]), entry([5, 6])
    cache.entries += [first, second]
    assert cache.find([1, 2], [5, 6, 7, 8]) == (first, 3)
    assert cache.find([1, 2], [5, 6, 9]) == (second, 2)  # nothing has to be given up
    assert cache.find([1, 2], [9]) == (second, 0)
    assert cache.find([1], [5]) == (None, -1)
    assert cache.take(first, [1, 2], [5, 6], fork=False) is first  # a word that was cut
    assert (first.tail, cache.entries) == ([5, 6], [second, first])
    fork = cache.take(second, [1, 2], [5], fork=True)
    assert (fork.tail, second.tail) == ([5], [5, 6])
    assert fork.states[:, :, 0, 0].tolist() == [[0, 1, 2]] * 4
    long = entry(list(range(WORD + 1)))
    assert cache.take(long, [1, 2], [], fork=False) is not long  # too much to give up
    fork.make_room(9)
    assert (fork.states.shape[1], len(fork.sums), fork.sums[2].item()) == (9, 9, 2)
    cache = TextCache(cache._states, cache._sums, first.states.nbytes + first.sums.nbytes)
    cache.entries += [second, first]
    cache.evict()
    assert cache.entries == [first]


def test_prompts_of_a_stream_are_held_each(bert_folder: Path, small_bpe) -> None:
    """Whatever was asked in one step, the next token of each is one node."""
    encoder = load_encoder(str(bert_folder), "mean", policy="incremental")
    tokenizer = cut_vocabulary(encoder.tokenizer, SENTENCES, 10_000)
    held = PrefixStream(PrefixPlanner(encoder, tokenizer, shares_vocabulary=True))
    rows = [tokenizer(SENTENCES[i])["input_ids"] for i in (0, 2, 3, 4)]
    held.of_rows([row[:3] for row in rows], 0)
    with counted_tokens(encoder) as nodes:
        held.step([row[:4] for row in rows])
    assert nodes == [4]


def test_an_interrupted_step_leaves_nothing_half_written(
    bert_folder: Path, small_bpe, monkeypatch
) -> None:
    encoder = load_encoder(str(bert_folder), "mean", policy="incremental")
    planner = PrefixPlanner(encoder, small_bpe)
    stream = encoder.stream()
    row = small_bpe(SENTENCES[3])["input_ids"]
    inputs = planner.inputs([row])
    expected = encoder.encode(inputs)
    stream.encode(inputs[:5])
    with monkeypatch.context() as patch:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(encoder.layers, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.encode(inputs[5:7])
    assert not stream.cache.entries
    for i in range(5, len(inputs)):
        torch.testing.assert_close(stream.encode([inputs[i]])[0], expected[i], atol=1e-5, rtol=1e-5)


def test_words_of_a_stream_are_tokenised_once(bert_folder: Path, monkeypatch) -> None:
    encoder = load_encoder(str(bert_folder), "mean", policy="incremental")
    tokenizer = train_bpe(SENTENCES, 280)
    stream = PrefixStream(PrefixPlanner(encoder, tokenizer))
    row = tokenizer(" ".join(SENTENCES[:8]))["input_ids"][:60]
    asked: list[int] = []
    tokenized = encoder._tokenized
    monkeypatch.setattr(
        encoder, "_tokenized", lambda t: asked.append(max(map(len, t))) or tokenized(t)
    )
    for t in range(1, len(row) + 1):
        stream.step([[1, *row[:t]]])
    assert max(asked[-10:]) < 12  # words, not the prefix


def test_texts_that_begin_alike_share_a_tree() -> None:
    tree = Tree([1, 2], [], 1)
    for tail in ([5], [5, 6], [5, 7], [5, 7, 8]):
        assert tree.add(tail)
    assert not tree.add([9])  # it begins otherwise
    assert tree.ends == [0, 1, 2, 3]
