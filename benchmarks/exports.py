"""What an export gains and what it costs: fp32, fp16 and int8 against PyTorch, in one run.

    python -m fusion_model.benchmarks.exports --text FILE [--model MODEL] [--threads 1] [--out FILE]

A token, and 16 x 256 tokens: H = 768, V = 8192, late concatenation, embeddings of 384 numbers
already computed; the engines take turns, and rest between them, since threads of one library that
spin for work would take cores from the next. Size, perplexity, and the token that is farthest
from PyTorch: MODEL with its encoder, from text. The results go to FILE; in a clone, the table to
`docs/onnx.md`.
"""

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from fusion_model.benchmarks.measure.machine import checkout, describe, where
from fusion_model.benchmarks.measure.records import home
from fusion_model.benchmarks.measure.timing import measure_in_turns
from fusion_model.export import OnnxFusionLM, export_model
from fusion_model.export.manifest import PRECISIONS
from fusion_model.export.runtime.session import default_threads

from fusion_model import FusionLM, FusionLMConfig, FusionLMForCausalLM, load
from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document, read_documents
from fusion_model.errors import FusionLMError
from fusion_model.files import write_text
from fusion_model.loading import load_model
from fusion_model.progress import note
from fusion_model.scoring import TextModel, score_sentences

BATCH, LENGTH = 16, 256
BUDGET = 3.0  # seconds of each engine
CONFIG: dict[str, Any] = {"fusion": "concat", "prefix_size": 384}
PAGE = "docs/onnx.md"


def latencies(
    folder: Path, threads: int, budget: float = BUDGET, **sizes: int
) -> dict[str, dict[str, Any]]:
    """Of each engine p50, p90 and p99 in ms: of a token, and of scoring `BATCH` x `LENGTH`.

    Args:
        folder: for the graphs.
        budget: seconds of each engine; 0 for a call or two.
        sizes: of the model, instead of those above.
    """
    torch.manual_seed(0)
    tokenizer = load_model("fusion-lm-small")[1]
    model = FusionLMForCausalLM(FusionLMConfig(**CONFIG | sizes)).eval()
    config, generator = model.config, np.random.default_rng(0)
    ids = generator.integers(0, config.vocab_size, (BATCH, LENGTH + 1))
    e = generator.standard_normal((BATCH, LENGTH, config.prefix_size)).astype(np.float32)
    state: Any = None

    @torch.inference_mode()
    def torch_token() -> None:
        nonlocal state
        first = torch.from_numpy(e[:1, :1])
        state = model(torch.tensor([[5]]), prefix_embeds=first, state=state).state

    @torch.inference_mode()
    def torch_scoring() -> None:
        model.token_log_probs(torch.from_numpy(ids), torch.from_numpy(e))

    runs: dict[str, dict[str, Callable[[], Any]]] = {
        "token": {"torch": torch_token},
        "scoring": {"torch": torch_scoring},
    }
    for precision in PRECISIONS:
        out = folder / f"latencies-{precision}"
        export_model(FusionLM(model, tokenizer, None), out, precision=precision)
        exported = OnnxFusionLM(out, device="cpu", threads=threads)
        steps = exported.steps(e[0, 0])
        steps.start([[5]])
        runs["token"][precision] = partial(steps.advance, [5], [0])
        runs["scoring"][precision] = partial(exported.token_log_probs, ids, e)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = {what: measure_in_turns(own, "cpu", budget) for what, own in runs.items()}
    finally:
        torch.set_num_threads(before)
    return {
        what: {
            name: {f"p{q}_ms": round(1e3 * timing.percentile(q), 4) for q in (50, 90, 99)}
            for name, timing in timings.items()
        }
        for what, timings in found.items()
    }


def from_text(model: str, documents: Sequence[Document], folder: Path) -> dict[str, Any]:
    """Of each engine the perplexity; of exports also MB, and how far their tokens are from
    PyTorch's, in nats.

    Raises:
        FusionLMError: the engines do not score the same number of tokens.
    """
    lm = load(model)
    expected, own = _scored(lm, documents)
    found: dict[str, dict[str, Any]] = {"torch": own}
    for precision in PRECISIONS:
        out = folder / precision
        export_model(lm, out, encoder=True, precision=precision)
        exported = OnnxFusionLM(out, device="cpu", threads=default_threads())
        nats, own = _scored(exported, documents)
        if own["tokens"] != found["torch"]["tokens"]:
            raise FusionLMError(
                f"{precision} scored {own['tokens']} tokens, PyTorch another number"
            )
        error = np.abs(nats - expected)
        size = {path.name: path.stat().st_size / 1e6 for path in out.glob("*")}
        encoder = sum(mb for name, mb in size.items() if name.startswith("encoder"))
        language = sum(size[name] for name in ("model.onnx", "step.onnx", "weights.bin"))
        own |= {"model_mb": language, "encoder_mb": encoder}
        own |= {"mean_error_nats": float(error.mean()), "worst_error_nats": float(error.max())}
        found[precision] = own
    return found


def _scored(lm: TextModel, documents: Sequence[Document]) -> tuple[np.ndarray, dict[str, Any]]:
    """Nats of every token, and what they come to."""
    corpus = Corpus.from_documents(documents, lm.tokenizer)
    scores = score_sentences(lm, lm.encode_corpus(corpus))
    nats = np.concatenate([s.tokens for s in scores]).astype(np.float64)
    found = {
        "perplexity": float(np.exp(nats.mean())),
        "tokens": len(nats),
        "words": sum(len(s.split()) for d in documents for s in d.sentences),
    }
    note(f"{type(lm).__name__}: {found}")
    return nats, found


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each engine."""
    lines = [
        "| | a token, p50 ms | 16 × 256 tokens, p50 ms | MB, model + encoder | perplexity "
        "| farthest token, nats |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    text = results["text"]
    for name in ("torch", *PRECISIONS):
        cells = ["PyTorch" if name == "torch" else f"ONNX {name}"]
        for what in ("token", "scoring"):
            own, plain = (results[what][engine]["p50_ms"] for engine in (name, "torch"))
            cells.append(f"{own:.3g}" + (f" ({plain / own:.2f}×)" if name != "torch" else ""))
        own = text[name]
        cells.append(f"{own['model_mb']:.1f} + {own['encoder_mb']:.1f}" if name != "torch" else "")
        ratio = f" ({own['perplexity'] / text['torch']['perplexity']:.4f}×)"
        cells.append(f"{own['perplexity']:.2f}" + (ratio if name != "torch" else ""))
        cells.append(f"{own['worst_error_nats']:.2g}" if name != "torch" else "")
        lines.append(f"| {' | '.join(cells)} |")
    what = f"`{results['model']}` on {text['torch']['words']:,} words of `{results['file']}`"
    return "\n".join([*lines, "", f"{what}, policy `{results['policy']}`; latencies on "
                      f"{results['machine']['threads']} thread(s), in turns."])  # fmt: skip


def main(
    text: Annotated[list[str], typer.Option(help="file, folder, or hf:NAME; repeatable")],
    model: Annotated[str, typer.Option(help="as fusion_model.load takes it")] = "fusion-lm-small",
    threads: Annotated[int, typer.Option(min=1, help="of the latencies")] = 1,
    out: Annotated[Path | None, typer.Option(help="default: in out/bench")] = None,
) -> None:
    """Measure, write the results, and renew the table."""
    documents, root = read_documents(text), checkout()
    policy = load(model).model.config.policy
    machine = describe("cpu", threads)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "machine": machine,
            "model": model,
            "file": Path(text[0]).name,
            "policy": policy,
            **latencies(Path(folder), threads),
            "text": from_text(model, documents, Path(folder)),
        }
    path = out or (home() or Path()) / f"{machine['date'][:10]}-cpu-exports.json"
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=1) + "\n")
    print(table(results))
    if root is not None and path.is_relative_to(root):
        page = root / PAGE
        name = path.relative_to(root).as_posix()
        block = f"<!-- exports from {name} -->\n{table(results)}\n\n{where(machine)}\n<!-- end -->"
        pattern = re.compile(r"<!-- exports\b.*?<!-- end -->", re.DOTALL)
        write_text(page, pattern.sub(lambda _: block, page.read_text(encoding="utf-8")))
        print(f"wrote {path} and {page}")


if __name__ == "__main__":
    typer.run(main)
