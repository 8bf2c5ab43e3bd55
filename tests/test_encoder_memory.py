"""How many tokens an encoder takes at once, and batches that overlap."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES
from fusion_model.encoders.transfers import Returns, overlapped, sent
from test_cli import run

from fusion_model.data.tokenizer import train_bpe
from fusion_model.encoders import batching as encoder_memory
from fusion_model.encoders import load_encoder
from fusion_model.encoders import pretrained as hf_encoder
from fusion_model.encoders.batching import (
    free_memory,
    free_ram,
    shrinking,
    token_budget,
    token_bytes,
)
from fusion_model.errors import EncoderError
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.training import data as preparation

MINILM = (384, 1536, 12, 4)


def test_the_budget_is_what_helps_or_what_fits() -> None:
    plenty = 2**40
    assert token_budget(plenty, "cpu", *MINILM) == token_budget(None, "cpu", *MINILM) == 2048
    assert token_budget(plenty, "cuda", *MINILM) == 65536
    assert token_budget(plenty, "cpu", 384, 1536, 12, 2) == 4096
    assert token_budget(plenty, "cuda", 768, 3072, 12, 4) == 32768  # wider: fewer are enough
    for tokens in (300, 1000, 2000):
        free = 4 * tokens * token_bytes(*MINILM)
        assert token_budget(free, "cpu", *MINILM) == tokens
        assert token_budget(free - 1, "cpu", *MINILM) == tokens - 1
    assert token_budget(0, "cpu", *MINILM) == encoder_memory.LEAST
    assert token_bytes(*MINILM[:3], 2) < token_bytes(*MINILM)


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [
        (None, None, 4_096_000),
        ("max", "9", 4_096_000),
        ("2048000", "48000", 2_000_000),
        ("10", "20", 0),
    ],
)
def test_free_ram_heeds_a_container(
    limit: str | None, used: str | None, expected: int, tmp_path: Path
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    if limit is not None and used is not None:
        group = tmp_path / "sys" / "fs" / "cgroup"
        group.mkdir(parents=True)
        (group / "memory.max").write_text(limit + "\n")
        (group / "memory.current").write_text(used + "\n")
    assert free_ram(tmp_path) == expected


def test_free_memory_is_that_of_the_machine() -> None:
    found = free_memory(torch.device("cpu"))
    assert found is not None
    assert 2**20 < found < 2**50
    assert free_memory(torch.device("meta")) is None


def test_little_memory_makes_small_batches(bert_folder: Path, monkeypatch) -> None:
    encoder = load_encoder(str(bert_folder), "mean")
    items = encoder.inputs_from_texts([s[:n] for s in SENTENCES[:8] for n in range(1, len(s))])
    expected = encoder.encode(items)
    sizes: list[int] = []
    pooled = encoder._pooled_batch

    def counted(groups):
        sizes.append(sum(g.numel() for g in groups))
        return pooled(groups)

    monkeypatch.setattr(encoder, "_pooled_batch", counted)
    encoder.encode(items)
    assert len(sizes) == 1
    one = token_bytes(16, 32, 2, 4)
    monkeypatch.setattr(hf_encoder, "free_memory", lambda device: 4 * 300 * one)
    assert encoder.budget == 300
    torch.testing.assert_close(encoder.encode(items), expected, atol=1e-5, rtol=1e-5)
    assert len(sizes) > 2
    assert max(sizes[1:]) <= 300
    encoder.tokens_per_batch = 77  # the user's word counts
    encoder.encode(items)
    assert max(sizes[-3:]) <= 77
    assert load_encoder(str(bert_folder), "mean", tokens_per_batch=77).budget == 77
    with pytest.raises(EncoderError, match="at least 1 token at once, not 0"):
        load_encoder(str(bert_folder), "mean", tokens_per_batch=0)


@pytest.mark.parametrize("policy", ["every", "incremental"])
def test_out_of_memory_halves_the_budget(
    policy: str, bert_folder: Path, monkeypatch, capsys
) -> None:
    encoder = load_encoder(str(bert_folder), "mean", policy=policy)
    bpe = train_bpe(SENTENCES, 280)
    rows = [bpe(" ".join(SENTENCES[i : i + 2]))["input_ids"] for i in range(8)]
    items = PrefixPlanner(encoder, bpe).items(rows)
    expected = encoder.encode(items)
    most, failed = (600 if policy == "every" else 90), []
    run = encoder._layers.run

    def tight(hidden, *rest):
        if len(hidden) > most:
            failed.append(len(hidden))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(hidden, *rest)

    monkeypatch.setattr(encoder._layers, "run", tight)
    monkeypatch.setattr(encoder_memory, "LEAST", 20)
    encoder.tokens_per_batch = 4000
    told: list[tuple[int, int]] = []
    found = encoder.encode(items, lambda done, total: told.append((done, total)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert told[-1][0] == told[-1][1]
    assert failed
    assert encoder.tokens_per_batch < 4000
    assert "out of memory, going on with 2000 tokens a batch" in capsys.readouterr().err


def test_memory_that_is_too_small_is_named() -> None:
    def encode(places, budget) -> Iterator[list[int]]:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield places

    budgets: list[int] = []
    with pytest.raises(EncoderError, match="does not hold 256 encoder tokens: CUDA out of memory"):
        list(shrinking(range(3), 1000, encode, budgets.append))
    assert budgets == [500, 256]


def test_what_was_done_before_is_not_done_again() -> None:
    asked = []

    def encode(places, budget) -> Iterator[list[int]]:
        asked.append(list(places))
        for place in places:
            if budget > 500 and place == 2:
                raise torch.OutOfMemoryError("full")
            yield [place]

    assert list(shrinking(range(5), 1000, encode, lambda budget: None)) == [[i] for i in range(5)]
    assert asked == [[0, 1, 2, 3, 4], [2, 3, 4]]


class Log:
    """Batches that note when they are started and waited for."""

    def __init__(self, fails: int = -1) -> None:
        self.events: list[str] = []
        self.fails = fails

    def start(self, batch: int):
        if batch == self.fails:
            raise RuntimeError("batch failed")
        self.events.append(f"start {batch}")

        def wait() -> torch.Tensor:
            self.events.append(f"wait {batch}")
            return torch.tensor([batch])

        return wait


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_batches_overlap_and_keep_their_order(ahead: int) -> None:
    log = Log()
    found = [(batch, int(out)) for batch, out in overlapped(range(4), log.start, ahead)]
    assert found == [(i, i) for i in range(4)]
    for i in range(4):
        began_before = log.events[: log.events.index(f"wait {i}")]
        assert began_before.count(f"start {min(i + ahead, 3)}") == 1
        assert f"start {i + ahead + 1}" not in began_before


def test_an_error_or_an_interruption_ends_it() -> None:
    log = Log(fails=2)
    done: list[int] = []
    with pytest.raises(RuntimeError, match="batch failed"):
        done.extend(batch for batch, _ in overlapped(range(4), log.start, 1))
    assert log.events == ["start 0", "start 1", "wait 0"]
    log = Log()
    going = overlapped(range(4), log.start, 1)
    next(going)
    going.close()  # Ctrl-C in the caller
    assert log.events == ["start 0", "start 1", "wait 0"]


def test_on_the_cpu_nothing_is_ahead() -> None:
    cpu = torch.device("cpu")
    returns, vectors = Returns(cpu), torch.randn(3, 2).bfloat16()
    assert returns.ahead == 0
    assert returns.start(vectors)().dtype == torch.float32
    assert torch.equal(returns.start(vectors)(), vectors.float())
    assert sent(vectors, cpu) is vectors


def test_embed_takes_the_users_batch(
    bert_folder: Path, text_file: Path, tmp_path: Path, monkeypatch
) -> None:
    asked = []
    load = preparation.load_encoder
    monkeypatch.setattr(
        preparation,
        "load_encoder",
        lambda *args, **options: asked.append(load(*args, **options)) or asked[-1],
    )
    arguments = ["--text", text_file, "--encoder", bert_folder, "--vocab-size", "300"]
    code, _, _ = run("embed", *arguments, "--out", tmp_path / "store", "--encoder-batch", "123")
    assert code == 0
    assert asked[0].budget == 123
