"""What an export is held to before it is kept, and the figures that its manifest reports.

The reference is the PyTorch model in float64. A float32 graph may be as far from it as PyTorch's
own float32 is, and a little more.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from fusion_model.export.runtime.generation import log_softmax
from fusion_model.export.runtime.sequences import Sequences
from fusion_model.export.runtime.steps import Steps

from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document
from fusion_model.encoders import TextEncoder
from fusion_model.encoders.policies import parse_policy
from fusion_model.encoders.pretrained import HFEncoder
from fusion_model.errors import EncoderError, ExportError
from fusion_model.language_model import FusionLM
from fusion_model.model import FusionLMForCausalLM
from fusion_model.scoring import TextModel, score_sentences

# In nats. float32 is held to the worst of all tokens of the vocabulary; fewer bits to the mean over
# tokens as likely as the model thinks them, since they may misjudge what never comes.
LIMITS = {"fp32": 1e-5, "fp16": 1e-2, "int8": 0.1}
PERPLEXITY_LIMITS = {"fp32": 1e-5, "fp16": 1e-3, "int8": 5e-2}  # |ratio - 1|, of few tokens
TEXT_LIMIT = 5e-3  # the same, of a text
SHAPES = ((1, 1), (1, 2), (3, 7), (2, 64))  # B, T


def check_graph(path: Path) -> dict[str, int]:
    """Nodes of a graph by type, once it is known to be sound.

    Raises:
        ExportError: `onnx.checker` or shape inference refuse it.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name} is not sound ONNX: {error}") from error
    graph = onnx.load(path, load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node))


def clone(model: FusionLMForCausalLM, dtype: torch.dtype) -> FusionLMForCausalLM:
    """The model once more, on the CPU, without what is attached to it."""
    copied = FusionLMForCausalLM(model.config)
    copied.load_state_dict(model.state_dict())
    copied.to(dtype=dtype)  # type: ignore[call-arg]
    return copied.eval()


def check_parity(
    model: FusionLMForCausalLM, sequences: Sequences, steps: Steps, precision: str
) -> dict[str, float]:
    """Both graphs against PyTorch, on tokens that the model itself finds likely.

    Args:
        model: float32, in evaluation mode.
        sequences: the exported sequence graph.
        steps: the exported step graph; its embeddings are set here.

    Returns:
        Greatest and mean errors in nats, PyTorch's own in float32 among them, and the ratio of
        perplexities.

    Raises:
        ExportError: an error above its limit.
    """
    double = clone(model, torch.float64)
    worst = {"pytorch": 0.0, "sequence": 0.0, "step": 0.0}
    sums = {"pytorch": 0.0, "sequence": 0.0, "step": 0.0}
    exported, reference, total = 0.0, 0.0, 0
    for number, (batch, length) in enumerate(SHAPES):
        ids, e = sample(model, batch, length + 1, seed=number)
        log_probs = _log_probs(double, ids[:, :-1], e)
        expected = np.take_along_axis(log_probs, ids[:, 1:, None], axis=2)[..., 0]
        found, _, _ = sequences.run(ids[:, :-1], ids[:, 1:], e, np.zeros(1, dtype=np.int64))
        errors = {
            "pytorch": np.abs(_log_probs(model, ids[:, :-1], e) - log_probs),
            "sequence": np.abs(found - expected),
            "step": np.abs(step_log_probs(steps, ids[:, :-1], e) - log_probs),
        }
        for name, error in errors.items():
            weight = 1 if name == "sequence" else np.exp(log_probs)  # targets were drawn so
            worst[name] = max(worst[name], float(error.max()))
            sums[name] += float((error * weight).sum())
        exported, reference = exported - float(found.sum()), reference - float(expected.sum())
        total += expected.size
    figures = {f"max_error_{name}_nats": value for name, value in worst.items()}
    figures |= {f"mean_error_{name}_nats": value / total for name, value in sums.items()}
    figures |= {"perplexity_ratio": float(np.exp((exported - reference) / total)), "tokens": total}
    _hold_to_limits(figures, precision)
    return figures


def _hold_to_limits(figures: dict[str, float], precision: str) -> None:
    kind = "max" if precision == "fp32" else "mean"
    sequence, step, own = (
        figures[f"{kind}_error_{name}_nats"] for name in ("sequence", "step", "pytorch")
    )
    limit = LIMITS[precision] + own
    if not max(sequence, step) <= limit:
        raise ExportError(
            f"the export does not agree with PyTorch: log-probabilities differ by {sequence:.2g} "
            f"(sequence) and {step:.2g} (step) nats ({kind}), allowed are {limit:.2g}; export "
            "with --precision fp32"
        )
    _hold_ratio(figures["perplexity_ratio"], PERPLEXITY_LIMITS[precision], "perplexity")


def _hold_ratio(ratio: float, limit: float, what: str) -> None:
    if not abs(ratio - 1) <= limit:
        raise ExportError(
            f"the export's {what} is {ratio:.4f} times PyTorch's, which is more than {limit:.2g} "
            "off: export with --precision fp32"
        )


@torch.inference_mode()
def sample(
    model: FusionLMForCausalLM, batch: int, length: int, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids [B, T] that the model draws, and embeddings [B, T - 1, E] (random; None if unfused)."""
    generator = torch.Generator().manual_seed(seed)
    e = None
    if model.config.fusion != "none":
        size = (batch, length - 1, model.config.prefix_size)
        e = 0.1 * torch.randn(size, generator=generator)
    ids = torch.randint(model.config.vocab_size, (batch, 1), generator=generator)
    for t in range(1, length):
        own = None if e is None else e[:, :t]
        p = model(ids, prefix_embeds=own, logits_to_keep=1).logits[:, -1].softmax(dim=-1)
        ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    return ids.numpy(), None if e is None else e.numpy()


@torch.inference_mode()
def _log_probs(model: FusionLMForCausalLM, ids: np.ndarray, e: np.ndarray | None) -> np.ndarray:
    """Log-probabilities of every token at every position, [B, T, V]."""
    given = None if e is None else torch.from_numpy(e)
    logits = model(torch.from_numpy(ids), prefix_embeds=given, use_cache=False).logits
    found: np.ndarray = logits.log_softmax(dim=-1).numpy()
    return found


def step_log_probs(steps: Steps, ids: np.ndarray, e: np.ndarray | None) -> np.ndarray:
    """The same from the step graph, one token after the other, [B, T, V].

    Args:
        ids: [B, T].
        e: [B, T, E]; `steps` gets its embeddings from here.
    """

    def embeds(rows: Sequence[Sequence[int]], last: int) -> np.ndarray:
        assert e is not None
        end = len(rows[0])
        return np.ascontiguousarray(e[:, end - last : end])

    steps.prefix_embeds = None if e is None else embeds
    rows = ids[:, :1].tolist()
    logits = [steps.start(rows)]
    for t in range(1, ids.shape[1]):
        logits.append(steps.advance(ids[:, t].tolist(), range(len(ids))))
    return log_softmax(np.stack(logits, axis=1))


def check_text(
    lm: FusionLM, exported: TextModel, own_encoder: bool, sentences: Sequence[str]
) -> dict[str, float]:
    """What is exported against PyTorch on real text with its own embeddings.

    Args:
        own_encoder: the encoder is exported, too; else both sides have PyTorch's vectors.

    Returns:
        The ratio of perplexities, the mean and the greatest error of a token in nats, and how
        many tokens there were.

    Raises:
        ExportError: the perplexity is more than `TEXT_LIMIT` off.
    """
    shown = [s for s in sentences if lm.planner is None or _fits(lm.planner.encoder, s)]
    corpus = Corpus.from_documents([Document("text", shown)], lm.tokenizer)
    batches = lm.encode_corpus(corpus)
    theirs = exported.encode_corpus(corpus) if own_encoder else batches
    exact, found = (
        np.concatenate([s.tokens for s in score_sentences(*scored)]).astype(np.float64)
        for scored in ((lm, batches), (exported, theirs))
    )
    errors = found - exact
    ratio = float(np.exp(errors.mean()))
    _hold_ratio(ratio, TEXT_LIMIT, "perplexity of a text")
    worst, mean = float(np.abs(errors).max()), float(np.abs(errors).mean())
    return {"perplexity_ratio": ratio, "mean_error_nats": mean, "max_error_nats": worst,
            "tokens": len(errors)}  # fmt: skip


def _fits(encoder: TextEncoder, sentence: str) -> bool:
    try:
        encoder.inputs_from_texts([sentence])
    except EncoderError:
        return False
    return True


def check_encoder(encoder: HFEncoder, exported: Any, texts: Sequence[str]) -> float:
    """Greatest difference of vectors of texts, relative to the greatest component.

    Raises:
        ExportError: more than 1e-4 in float32, or 0.5 in int8, whose worth the text shows.
    """
    inputs = encoder.inputs_from_texts(texts)
    if exported.inputs_from_texts(texts) != inputs:
        raise ExportError(f"the tokenizer of {encoder.name} does not come out the same: keep it")
    incremental = parse_policy(encoder.policy).name == "incremental"
    inputs = [
        encoder.incremental_input(None, own) if incremental else encoder.reused_input(own, own)
        for own in inputs
    ]
    expected = np.asarray(encoder.encode(inputs))
    found = [exported.encode(inputs)]
    if hasattr(exported, "stream"):
        stream = exported.stream()
        found.append(np.concatenate([stream.encode([own]) for own in inputs]))
    difference = max(float(np.abs(v - expected).max() / np.abs(expected).max()) for v in found)
    limit = 0.5 if getattr(exported, "precision", "fp32") == "int8" else 1e-4
    if not difference <= limit:
        raise ExportError(
            f"the exported encoder's vectors differ from PyTorch's by {difference:.2g} of their "
            "size: export without --encoder"
        )
    return difference
