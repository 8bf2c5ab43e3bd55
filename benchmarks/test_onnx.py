"""One token, and 16 x 256 tokens: PyTorch against ONNX Runtime, in one run.

H = 768, V = 8192, late concatenation, embeddings of 384 numbers already computed. The engines take
turns, so that whatever else the machine does hits all of them: ratios hold where single figures
do not. Run with `pytest benchmarks/test_onnx.py --benchmark-enable`.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fusion_model.benchmarks.measure.timing import measure_in_turns
from fusion_model.export.graphs.language import sequence_graph, step_graph
from fusion_model.export.graphs.quantize import quantize
from fusion_model.export.runtime.sequences import Sequences
from fusion_model.export.runtime.session import open_session
from fusion_model.export.runtime.steps import Steps

from fusion_model import FusionLMConfig, FusionLMForCausalLM

OPSET, BATCH, LENGTH = 20, 16, 256
BUDGET = 3.0  # seconds of each engine
CONFIG = FusionLMConfig(fusion="concat", prefix_size=384)
FACTS = {
    name: getattr(CONFIG, name)
    for name in ("fusion", "vocab_size", "hidden_size", "num_layers", "prefix_size")
}
Engines = dict[str, Callable[[], Any]]


@pytest.fixture(scope="module")
def model() -> FusionLMForCausalLM:
    torch.manual_seed(0)
    return FusionLMForCausalLM(CONFIG).eval()


@pytest.fixture(scope="module")
def graphs(model: FusionLMForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    for name, build in (("sequence", sequence_graph), ("step", step_graph)):
        graph = build(model, OPSET)
        onnx.save(graph, folder / f"{name}-fp32.onnx")
        onnx.save(quantize(graph), folder / f"{name}-int8.onnx")
    return folder


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def take_turns(benchmark: Any, engines: Engines, tokens: int) -> None:
    """Every engine in turn; medians, percentiles and ratios go to `extra_info`."""
    budget = 0.0 if benchmark.disabled else BUDGET
    timings = benchmark.pedantic(measure_in_turns, (engines, "cpu", budget), rounds=1)
    info = benchmark.extra_info
    info["onnxruntime"] = onnxruntime.__version__
    for name, timing in timings.items():
        p50, p90, p99 = (1e3 * timing.percentile(q) for q in (50, 90, 99))
        info[name] = {
            "p50_ms": round(p50, 3),
            "p90_ms": round(p90, 3),
            "p99_ms": round(p99, 3),
            "tokens_per_second": round(1e3 * tokens / p50),
            "of_torch": round(1e-3 * p50 / timings["torch"].percentile(50), 3),
        }
        print(f"\n{benchmark.name} {name}: {info[name]}", end="")


@pytest.mark.benchmark(group="onnx-token")
def test_one_token(benchmark: Any, model: FusionLMForCausalLM, graphs: Path, threads: int) -> None:
    e = np.random.default_rng(0).standard_normal((1, 1, CONFIG.prefix_size)).astype(np.float32)
    ids = torch.tensor([[5]])

    def same(rows: Sequence[Sequence[int]], last: int) -> np.ndarray:
        return e

    def torch_engine(backend: str) -> Callable[[], Any]:
        state = model(ids, prefix_embeds=torch.from_numpy(e)).state

        @torch.inference_mode()
        def step() -> None:
            nonlocal state
            model.set_backend(backend)
            state = model(ids, prefix_embeds=torch.from_numpy(e), state=state).state

        return step

    def onnx_engine(precision: str) -> Callable[[], Any]:
        session = open_session(graphs / f"step-{precision}.onnx", "cpu", threads)
        steps = Steps(session, FACTS, "cpu", same)
        steps.start([[5]])
        return lambda: steps.advance([5], [0])

    with torch.inference_mode():
        engines = {
            "torch": torch_engine("torch"),
            "torch-equations": torch_engine("reference"),
            "onnx-fp32": onnx_engine("fp32"),
            "onnx-int8": onnx_engine("int8"),
        }
    take_turns(benchmark, engines, 1)


@pytest.mark.benchmark(group="onnx-scoring")
def test_scoring(benchmark: Any, model: FusionLMForCausalLM, graphs: Path, threads: int) -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1))
    e = generator.standard_normal((BATCH, LENGTH, CONFIG.prefix_size)).astype(np.float32)
    boundary = np.zeros(1, dtype=np.int64)

    @torch.inference_mode()
    def by_torch() -> None:
        model.set_backend("torch")
        model.token_log_probs(torch.from_numpy(ids), torch.from_numpy(e))

    def onnx_engine(precision: str) -> Callable[[], Any]:
        session = open_session(graphs / f"sequence-{precision}.onnx", "cpu", threads)
        sequences = Sequences(session, FACTS)
        return lambda: sequences.run(ids[:, :-1], ids[:, 1:], e, boundary)

    engines: Engines = {
        "torch": by_torch,
        "onnx-fp32": onnx_engine("fp32"),
        "onnx-int8": onnx_engine("int8"),
    }
    take_turns(benchmark, engines, BATCH * LENGTH)
