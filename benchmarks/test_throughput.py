"""Tokens a second in training and evaluation against the published loop, in one run.

H = 768, V = 8192, late concatenation, embeddings of 768 numbers already computed. Run with
`pytest benchmarks/test_throughput.py --benchmark-enable`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from fusion_model.benchmarks.suite.published_loop import PublishedLM
from fusion_model.benchmarks.suite.zipf import zipf_sentences

from fusion_model.language_model import FusionLM
from fusion_model.scoring import score_sentences
from fusion_model.training.data import prepare
from fusion_model.training.options import TrainingOptions
from fusion_model.training.run import TrainingRun

SENTENCES, FEWER = 8000, 600  # FEWER where nothing is timed
ROUNDS = 3


def timed(config: pytest.Config) -> bool:
    return config.getoption("--benchmark-enable") or not config.getoption("--benchmark-disable")


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    folder = tmp_path_factory.mktemp("throughput")
    count = SENTENCES if timed(request.config) else FEWER
    (folder / "text.txt").write_text("\n".join(zipf_sentences(count)))
    files = (str(folder / "text.txt"),)
    options = TrainingOptions(
        train_file=files,
        dev_file=files,
        split="lines",
        encoder="counts",
        precision="bfloat16",
        tokens_per_batch=16_384,
        epochs=1,
    )
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    prepared = prepare(options, folder, folder / "store", accelerator)
    assert len(prepared.tokenizer) == 8192 or count == FEWER
    return TrainingRun(options, folder, prepared, accelerator)


@pytest.fixture(scope="module")
def published() -> PublishedLM:
    torch.manual_seed(0)
    return PublishedLM(8192)


def sentences_of(run: TrainingRun, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A random sample of sentences with their embeddings, one by one."""
    generator = torch.Generator().manual_seed(1)
    picked = torch.randperm(len(run.data.lengths), generator=generator)[:count].tolist()
    batches = [run.data.batch([i]) for i in picked]
    return [
        (torch.from_numpy(b.input_ids[0]), torch.from_numpy(b.prefix_embeds[0]))
        for b in batches
        if b.prefix_embeds is not None
    ]


def measure(benchmark: Any, run: Callable[[], Any], tokens: int) -> None:
    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info["tokens"] = tokens
    if benchmark.stats is not None:
        benchmark.extra_info["tokens_per_second"] = tokens / benchmark.stats.stats.min


def loss(model: PublishedLM, tokens: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(tokens, e), tokens[1:])


@pytest.mark.benchmark(group="training")
def test_training_published(benchmark: Any, run: TrainingRun, published: PublishedLM) -> None:
    optimizer = torch.optim.Adam(published.parameters(), lr=1e-5)
    sample = sentences_of(run, 10)

    def loop() -> None:
        for tokens, e in sample:
            found = loss(published, tokens, e)
            optimizer.zero_grad()
            found.backward()
            optimizer.step()
            found.item()

    measure(benchmark, loop, sum(len(tokens) - 1 for tokens, _ in sample))


@pytest.mark.benchmark(group="training")
def test_training_fusion_lm(benchmark: Any, run: TrainingRun) -> None:
    plan = run.plan(0)[:6]
    run.model.train()

    def loop() -> None:
        for indices in plan:
            run.step(indices, len(plan))

    measure(benchmark, loop, sum(int((run.data.lengths[i] - 1).sum()) for i in plan))


@pytest.mark.benchmark(group="evaluation")
def test_evaluation_published(benchmark: Any, run: TrainingRun, published: PublishedLM) -> None:
    sample = sentences_of(run, 20)

    @torch.no_grad()
    def loop() -> list[float]:
        return [loss(published, tokens, e).item() for tokens, e in sample]

    measure(benchmark, loop, sum(len(tokens) - 1 for tokens, _ in sample))


@pytest.mark.benchmark(group="evaluation")
def test_evaluation_fusion_lm(benchmark: Any, run: TrainingRun) -> None:
    lm = FusionLM(run.model, run.prepared.tokenizer, None)
    lm.model.to(dtype=torch.bfloat16)
    tokens = int((run.data.lengths - 1).sum())
    try:
        measure(benchmark, partial(score_sentences, lm, run.data), tokens)
    finally:
        run.model.float()
