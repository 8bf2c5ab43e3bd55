"""What the ONNX tests share: saved models, sessions in memory, and PyTorch's answers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import SENTENCES, small_model
from fusion_model.export.runtime.sequences import Sequences
from fusion_model.export.runtime.steps import Steps

from fusion_model import FusionLMForCausalLM
from fusion_model.encoders.controls import BagEncoder
from fusion_model.encoders.pretrained import HFEncoder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On busy cores, PyTorch's threads wait for one another at every small step."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


EARLY = ("init_hidden", "init_cell", "init_both")
NO_BOUNDARY = np.zeros(1, dtype=np.int64)
FACTS = ("fusion", "vocab_size", "hidden_size", "num_layers", "prefix_size")


def session(graph: onnx.ModelProto | Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    content = str(graph) if isinstance(graph, Path) else graph.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def facts(model: FusionLMForCausalLM) -> dict[str, Any]:
    return {name: getattr(model.config, name) for name in FACTS}


def sequences(model: FusionLMForCausalLM, graph: onnx.ModelProto | Path) -> Sequences:
    return Sequences(session(graph), facts(model))


def steps(
    model: FusionLMForCausalLM, graph: onnx.ModelProto | Path, one_vector: bool = False
) -> Steps:
    return Steps(session(graph), facts(model), "cpu", None, one_vector)


def inputs(
    model: FusionLMForCausalLM, batch: int, length: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids [B, T + 1] and embeddings [B, T, E]."""
    generator = np.random.default_rng(length)
    ids = generator.integers(0, model.config.vocab_size, (batch, length + 1))
    if model.config.fusion == "none":
        return ids, None
    size = (batch, length, model.config.prefix_size)
    return ids, generator.standard_normal(size).astype(np.float32)


@torch.inference_mode()
def pytorch_log_probs(
    model: FusionLMForCausalLM, ids: np.ndarray, e: np.ndarray | None
) -> np.ndarray:
    """[B, T, V] of ids [B, T]."""
    given = None if e is None else torch.from_numpy(e)
    logits = model(torch.from_numpy(ids), prefix_embeds=given).logits
    return logits.log_softmax(dim=-1).numpy()


def saved_model(folder: Path, tokenizer: Any, encoder: Path | str, **options: Any) -> Path:
    """A folder as training leaves one; `encoder` is a folder, or `counts` or `tfidf`."""
    pooling = options.setdefault("pooling", "static+mean")
    if encoder in ("counts", "tfidf"):
        found: Any = BagEncoder.fit(str(encoder), SENTENCES, dim=12)
        found.save(folder)
    else:
        found = HFEncoder.load(str(encoder), pooling)
    fields = {
        "vocab_size": len(tokenizer),
        "prefix_size": found.dim,
        "encoder": str(encoder),
        "encoder_sha256": found.content_sha256,
        "num_layers": 2,
    }
    model = small_model(**(fields | options))
    with torch.no_grad():  # so that predictions differ from one another
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
