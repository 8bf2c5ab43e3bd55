"""The demo's last step: the same model exported, verified, and run by ONNX Runtime."""

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fusion_model.export.exporter import export_model, report
from fusion_model.export.runtime.model import OnnxFusionLM
from rich.console import Console
from rich.table import Table

from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document
from fusion_model.loading import load
from fusion_model.scoring import score_sentences

SENTENCE = "The old gentleman with the white beard sat down in his chair, and said nothing."
TOKENS, WARMUP = 60, 5
LN2 = math.log(2)


@torch.inference_mode()
def show_export(model: str) -> None:
    """Export a model in float32 and int8 to a temporary folder; print what came of it.

    Args:
        model: as `fusion_model.load` takes it.
    """
    console = Console()
    lm = load(model)
    table = Table(box=None)
    table.add_column("engine")
    for name in ("bits, one sentence", "LSTM p50 ms/token", "MB"):
        table.add_column(name, justify="right")
    vector = np.full(lm.model.config.prefix_size, 0.1, dtype=np.float32)
    source = lm.encode_corpus(Corpus.from_documents([Document("demo", [SENTENCE])], lm.tokenizer))
    bits = score_sentences(lm, source)[0].tokens.sum() / LN2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    checks: list[str] = []
    try:
        table.add_row("PyTorch", f"{bits:.2f}", f"{median_ms(torch_steps(lm.model, vector)):.2f}")
    finally:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "int8"):
            out = Path(folder) / precision
            manifest = export_model(lm, out, precision=precision)
            exported = OnnxFusionLM(out, device="cpu", threads=1)
            bits = score_sentences(exported, source)[0].tokens.sum() / LN2
            size = sum((out / n).stat().st_size for n in ("model.onnx", "weights.bin")) / 1e6
            steps = exported.steps(vector)
            steps.start([[lm.tokenizer.bos_token_id]])
            p50 = median_ms(lambda steps=steps: steps.advance([5], [0]))  # type: ignore[misc]
            table.add_row(f"ONNX {precision}", f"{bits:.2f}", f"{p50:.2f}", f"{size:.1f}")
            checks = checks or report(manifest)  # of fp32
    console.print("\n[bold]5. Exported to ONNX, one thread, embeddings already computed[/]")
    console.print(table)
    for line in checks:
        console.print(f"   {line}", highlight=False)
    console.print(
        "   with its encoder, for text to surprisal without PyTorch: "
        f"fusion-lm export {model} OUT --encoder",
        highlight=False,
        soft_wrap=True,
    )


def torch_steps(model: Any, vector: np.ndarray) -> Callable[[], None]:
    """One more token, each time it is called."""
    ids, e = torch.tensor([[5]]), torch.from_numpy(vector)[None]
    state = None

    @torch.inference_mode()
    def step() -> None:
        nonlocal state
        state = model(ids, prefix_embeds=e, state=state).state

    return step


def median_ms(step: Callable[[], Any]) -> float:
    """Median milliseconds of a call."""
    seconds = []
    for _ in range(WARMUP + TOKENS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return float(1e3 * np.median(seconds[WARMUP:]))
