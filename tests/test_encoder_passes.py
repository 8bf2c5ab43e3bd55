"""What the encoder's passes are made of, each against a plain form of it: linear layers, attention
in grids, replayed passes, and where a stream's nodes lie."""

import itertools
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, SENTENCES
from fusion_model.encoders.attention import AllToAll, similar
from fusion_model.encoders.graphs import CHECKED, OFTEN, Graphs

from fusion_model.data.tokenizer import cut_vocabulary, train_bpe
from fusion_model.encoders import attention, load_encoder
from fusion_model.encoders import linear as packed_linear
from fusion_model.encoders.incremental.trees import Tree
from fusion_model.encoders.linear import Linear, packed
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
    """All that `AllToAll` needs of an encoder."""

    heads, device = 2, torch.device("cpu")

    def __init__(self, relative: bool) -> None:
        self._bias = torch.randn(200, 2) if relative else None

    def position_bias(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        if self._bias is None:
            return None
        return self._bias[keys[:, None, :] - queries[:, :, None]].permute(0, 3, 1, 2)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("sizes", [[3], [40, 39, 17, 16, 15, 2, 2], [70, 3], [2, 2, 9]], ids=str)
def test_attention_in_grids(sizes: list[int], relative: bool) -> None:
    layers = Positions(relative)
    total, few = sum(sizes) + 5, (3, 2)
    query, key, value = (torch.randn(total, 2, 8) for _ in range(3))
    attend = AllToAll(sizes, layers, torch.float32, few)
    found = attend(0, query, key, value)
    of_few = attend(few[0], query[: 2 * len(sizes)], key, value)
    start = 0
    for number, size in enumerate(sizes):
        own = slice(start, start + size)
        k, v = (part[own].transpose(0, 1) for part in (key, value))
        at = torch.arange(size)[None]
        bias = layers.position_bias(at, at)
        scores = query[own].transpose(0, 1) @ k.transpose(1, 2) / 8**0.5
        scores = scores if bias is None else scores + bias[0]
        expected = (scores.softmax(-1) @ v).transpose(0, 1)
        torch.testing.assert_close(found[own], expected, atol=1e-5, rtol=1e-5)
        if bias is None:
            rows = slice(2 * number, 2 * number + 2)
            scores = query[rows].transpose(0, 1) @ k.transpose(1, 2) / 8**0.5
            expected = (scores.softmax(-1) @ v).transpose(0, 1)
            torch.testing.assert_close(of_few[rows], expected, atol=1e-5, rtol=1e-5)
        start += size
    assert not found[start:].any()


def test_little_of_a_grid_is_padding() -> None:
    sizes = sorted((random.Random(0).randrange(1, 300) for _ in range(200)), reverse=True)
    groups = similar(sizes)
    assert [a for a, _ in groups[1:]] == [b for _, b in groups[:-1]]
    assert (groups[0][0], groups[-1][1]) == (0, len(sizes))
    for first, end in groups:
        width = attention.width_of(sizes[first])
        assert all(size <= width for size in sizes[first:end])
        assert all(attention.width_of(size) >= 0.75 * width for size in sizes[first:end])
    assert len(groups) < 12
    assert similar([]) == []
    assert similar([3, 80, 80, 5]) == [(0, 1), (1, 3), (3, 4)]


def replayed_by_running(compute):
    """A capture without a GPU: a replay computes again, from the memory that was captured."""
    outputs = compute()

    def replay() -> None:
        for out, new in zip(outputs, compute(), strict=True):
            out.copy_(new)

    return replay, outputs


def wrong_second_time(compute):
    """A capture whose replays do not see new values."""
    return (lambda: None), [out.clone() for out in compute()]


def failing(compute):
    raise RuntimeError("operation not permitted when stream is capturing")


def test_passes_are_replayed_from_the_same_memory() -> None:
    graphs = Graphs(replayed_by_running, most=2)
    calls = []

    def step(x: torch.Tensor) -> torch.Tensor:
        def compute() -> list[torch.Tensor]:
            calls.append(x.data_ptr())
            return [2 * x]

        return graphs.run("double", [x], compute)[0]

    kept = [step(torch.full((3,), float(i))) for i in range(OFTEN + CHECKED + 4)]
    for i, out in enumerate(kept):  # each result is its own, not the graph's memory
        assert torch.equal(out, torch.full((3,), 2.0 * i))
    assert len(graphs) == 1
    assert len(set(calls[-3:])) == 1  # replays read one place
    for size in (4, 5):
        for _ in range(OFTEN):
            step(torch.ones(size))
    assert len(graphs) == 2  # bounded


@pytest.mark.parametrize(
    ("capture", "message"),
    [(failing, "capture failed .operation not"), (wrong_second_time, "replay differs from")],
)
def test_a_bad_graph_is_not_used(capture, message: str) -> None:
    graphs = Graphs(capture)

    def run(i: int) -> torch.Tensor:
        x = torch.full((3,), float(i))
        return graphs.run("double", [x], lambda: [2 * x])[0]

    with pytest.warns(UserWarning, match=message):
        found = [float(run(i)[0]) for i in range(8)]
    assert found == [2.0 * i for i in range(8)]
    assert len(graphs) == 0


@pytest.mark.parametrize("policy", ["incremental", "incremental+refresh:4"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replayed_streams_are_plain_ones(
    name: str, policy: str, encoder_folders: dict[str, Path], small_bpe
) -> None:
    """Static buffers and all, but for the capture itself: that needs a GPU."""
    encoder = load_encoder(str(encoder_folders[name]), "mean+last+cls+static", policy=policy)
    planner = PrefixPlanner(encoder, small_bpe)
    rows = [small_bpe(text)["input_ids"] for text in SENTENCES[:4]]
    streams = []
    for _ in range(2):  # two streams at once, each with a pool of its own
        pool = encoder.stream()
        pool.graphs = Graphs(replayed_by_running)
        stream = PrefixStream(planner)
        stream._encode = pool.encode
        streams.append((stream, pool))
    plain = PrefixStream(planner)
    for t in range(1, min(map(len, rows)) + 1):
        for number, (stream, _) in enumerate(streams):
            step = [[1, *row[:t]] for row in rows[number : number + 2]]
            found, expected = stream.step(step), plain.step(step)
            torch.testing.assert_close(
                torch.stack(found), torch.stack(expected), atol=1e-5, rtol=1e-5
            )
    assert all(len(pool.graphs) for _, pool in streams)


@pytest.mark.parametrize("pooling", ["mean", "cls+mask", "static+last@1"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replayed_texts_are_plain_ones(
    name: str, pooling: str, encoder_folders: dict[str, Path]
) -> None:
    plain, replayed = (load_encoder(str(encoder_folders[name]), pooling) for _ in range(2))
    replayed.graphs = Graphs(replayed_by_running)
    for text in SENTENCES:
        items = plain.inputs_from_texts([text])
        torch.testing.assert_close(
            replayed.encode(items), plain.encode(items), atol=1e-5, rtol=1e-5
        )
    assert len(replayed.graphs)


def test_each_sequence_of_a_stream_lies_in_a_row(bert_folder: Path, small_bpe) -> None:
    """However the steps of several are mixed, and where words are rolled back."""
    encoder = load_encoder(str(bert_folder), "mean", policy="incremental")
    planner = PrefixPlanner(encoder, small_bpe)
    pool = encoder.stream()
    stream = PrefixStream(planner)
    stream._encode = pool.encode
    different = [SENTENCES[i] for i in (0, 2, 3, 4, 6, 7)]  # those that fork share a row
    rows = [small_bpe(text)["input_ids"] for text in different]
    stream.of_rows([[1, *row[:3]] for row in rows], 0)
    for t in range(4, max(map(len, rows)) + 1):
        stream.step([[1, *row[:t]] for row in rows if len(row) >= t])
        paths = list(pool._paths.values())
        in_a_row = [path == list(range(path[0], path[0] + len(path))) for path in paths]
        assert all(in_a_row)
    used = {slot for path in paths for slot in path}
    assert all(not pool._is_free[slot] for slot in used)


def test_an_interrupted_step_leaves_nothing_half_written(
    bert_folder: Path, small_bpe, monkeypatch
) -> None:
    encoder = load_encoder(str(bert_folder), "mean", policy="incremental")
    planner = PrefixPlanner(encoder, small_bpe)
    pool = encoder.stream()
    row = small_bpe(SENTENCES[3])["input_ids"]
    items = planner.inputs([row])
    expected = encoder.encode(items)
    pool.encode(items[:5])
    with monkeypatch.context() as patch:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(encoder.layers, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.encode(items[5:7])
    assert len(pool) == 0
    for i in range(5, len(items)):
        torch.testing.assert_close(pool.encode([items[i]])[0], expected[i], atol=1e-5, rtol=1e-5)


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


def test_the_deepest_branch_comes_first() -> None:
    tree = Tree([1, 2], [], 1)
    for tail in ([5], [5, 6], [5, 7], [5, 7, 8], [9]):
        tree.add(tail)
    order = [tree.tokens[node] for node in tree.deepest_first()]
    assert order == [5, 7, 8, 6, 9]
    seen = set()
    for node in tree.deepest_first():
        assert tree.parents[node] in {-1, *seen}
        seen.add(node)
    assert len(seen) == len(tree.tokens)


def test_shared_vocabulary_streams_stay_in_a_row(bert_folder: Path) -> None:
    encoder = load_encoder(str(bert_folder), "last", policy="incremental")
    tokenizer = cut_vocabulary(encoder.tokenizer, SENTENCES, 10_000)
    planner = PrefixPlanner(encoder, tokenizer, shares_vocabulary=True)
    pool = encoder.stream()
    ids = tokenizer(" ".join(SENTENCES[:3]))["input_ids"]
    for t in range(1, len(ids) + 1):
        pool.encode(planner.inputs([ids[:t]])[-1:])
    (path,) = pool._paths.values()
    assert all(b == a + 1 for a, b in itertools.pairwise(path))
