"""`fusion-lm export`: a model as a folder that ONNX Runtime runs, verified before it is kept."""

import inspect
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import tokenizers
import torch
import transformers
from fusion_model.export.graphs.encoder import export_encoder
from fusion_model.export.graphs.incremental import WORDS, incremental_graph
from fusion_model.export.graphs.language import sequence_graph, step_graph
from fusion_model.export.graphs.weights import save_graphs
from fusion_model.export.manifest import (
    ENCODER,
    ENCODER_TOKENIZER,
    ENCODER_WEIGHTS,
    OLDEST_RUNTIME,
    OPSETS,
    PRECISIONS,
    SEQUENCE,
    STEP,
    WEIGHTS,
    strangers,
    write_manifest,
)
from fusion_model.export.runtime.model import OnnxFusionLM, open_encoder
from fusion_model.export.runtime.session import runtime
from fusion_model.export.runtime.steps import Steps
from fusion_model.export.runtime.tokenizer import describe_tokenizer
from fusion_model.export.verify import check_encoder, check_graph, check_parity, check_text, clone

import fusion_model
from fusion_model.data.text import read_text, split_sentences
from fusion_model.encoders import load_encoder
from fusion_model.encoders.controls import BAGS
from fusion_model.encoders.policies import parse_policy
from fusion_model.encoders.pretrained import HFEncoder
from fusion_model.errors import EncoderError, ExportError
from fusion_model.files import locked, replacing
from fusion_model.language_model import FusionLM
from fusion_model.loading import load, load_model
from fusion_model.progress import note

SAMPLE = (
    "",
    "A",
    "The cat sat on the mat.",
    "The cat sat on the mat, and the dog sat on the cat",
    "In the year 1847 nobody had yet heard of it; she, however, knew.",
)
TEXT = Path(fusion_model.__file__).parent / "samples" / "thursday.txt"
ERRORS = {"sequence": "sequence", "step": "step by step", "pytorch": "PyTorch fp32"}
FACTS = (
    *("fusion", "vocab_size", "embedding_size", "hidden_size", "num_layers", "prefix_size"),
    *("encoder", "encoder_sha256", "pooling", "view", "policy", "shuffle", "shares_vocabulary"),
)
ENCODER_FACTS = ("name", "pooling", "dim", "window", "policy", "content_sha256")


def export_model(
    model: str | FusionLM,
    out: str | Path,
    *,
    encoder: bool = False,
    encoder_path: str | None = None,
    precision: str = "fp32",
    opset: int = 20,
) -> dict[str, Any]:
    """Export a model, verify it against PyTorch, and return its manifest.

    Args:
        model: as `fusion_model.load` takes it, or what that returned.
        out: folder to write; an earlier export there is replaced.
        encoder: export the encoder of the prefixes, too, always in float32.
        encoder_path: where the encoder lies now, if it moved since training.
        precision: of the language model, `fp32`, `fp16` (for GPUs) or `int8` (for CPUs).
        opset: 20 or 21.

    Raises:
        ExportError: an unknown precision or opset; a folder that holds something else; a graph
            that is not sound or does not agree with PyTorch (nothing is written then).
        CheckpointError, EncoderError: see `fusion_model.load`.
    """
    out = Path(out).absolute()
    if precision not in PRECISIONS:
        raise ExportError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported: choose {' or '.join(map(str, OPSETS))}")
    if other := strangers(out):
        names = ", ".join(other[:3])
        raise ExportError(f"{out} holds something else than an export ({names}): name another")
    runtime()
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock"), str(out)):
        return _export(
            _load(model, encoder, encoder_path, precision), out, encoder, precision, opset
        )


def _export(
    lm: FusionLM, out: Path, with_encoder: bool, precision: str, opset: int
) -> dict[str, Any]:
    network, source = lm.model, None if lm.planner is None else lm.planner.encoder
    with replacing(out) as work:
        work.mkdir(parents=True)
        network.config.save_pretrained(work)
        network.generation_config.save_pretrained(work)
        lm.tokenizer.save_pretrained(work)
        facts = {name: getattr(network.config, name) for name in FACTS}
        if with_encoder and source is not None:
            facts["policy"] = source.policy  # of this model, where another was asked for
        _write_graphs(lm, facts, work, precision, opset)
        contents = {
            "model": facts,
            "tokenizer": describe_tokenizer(lm.tokenizer),
            "encoder": _write_encoder(source, work, precision, opset) if with_encoder else None,
            "precision": precision,
            "opset": opset,
            "oldest_onnxruntime": OLDEST_RUNTIME,
            "versions": _versions(),
            "verified": {},
        }
        write_manifest(work, contents)
        contents["verified"] = _verified(lm, OnnxFusionLM(work, device="cpu", threads=1))
        write_manifest(work, contents)
    return contents


def _load(
    model: str | FusionLM, with_encoder: bool, encoder_path: str | None, precision: str
) -> FusionLM:
    """Weights in float32 on the CPU; the encoder where it is wanted, and for int8 where it can be
    had, since a text is scored then."""
    if isinstance(model, FusionLM):
        return FusionLM(clone(model.model, torch.float32), model.tokenizer, model.planner)
    network, tokenizer = load_model(model)
    fused = network.config.fusion != "none"
    if fused and with_encoder:
        return load(model, encoder=encoder_path)
    if fused and precision == "int8":
        try:
            return load(model, encoder=encoder_path)
        except EncoderError as error:
            if encoder_path is not None:
                raise
            note(f"int8 is not held to a text, as the model's encoder is missing: {error}")
    return FusionLM(network, tokenizer, None)


def _write_graphs(
    lm: FusionLM, facts: dict[str, Any], folder: Path, precision: str, opset: int
) -> None:
    graphs = {}
    for name, build in ((SEQUENCE, sequence_graph), (STEP, step_graph)):
        graphs[folder / name] = build(lm.model, opset, precision)
        _describe(graphs[folder / name], build, {n: facts[n] for n in FACTS})
    save_graphs(graphs, folder / WEIGHTS)


def _describe(graph: onnx.ModelProto, build: Callable[..., Any], facts: dict[str, Any]) -> None:
    """What goes in and comes out, and of which model: for those who have the file alone."""
    graph.doc_string = inspect.cleandoc((build.__doc__ or "").partition("\n\n    Args:")[0])
    graph.producer_version = fusion_model.__version__
    onnx.helper.set_model_props(graph, {name: str(value) for name, value in facts.items()})


def _verified(lm: FusionLM, exported: OnnxFusionLM) -> dict[str, Any]:
    """What an export was held to, and how near it came."""
    nodes = {name: check_graph(exported.folder / name) for name in (SEQUENCE, STEP)}
    sequences, precision = exported._sequences, exported.manifest["precision"]
    steps, text = Steps(exported._step_session, exported.model, "cpu", None), None
    parity = check_parity(lm.model, sequences, steps, precision)
    if precision == "int8" and (lm.planner is not None or lm.model.config.fusion == "none"):
        sentences = split_sentences(read_text(TEXT))
        text = check_text(lm, exported, exported.manifest["encoder"] is not None, sentences)
    checks = ["onnx.checker", "shape inference"]
    return {"nodes": nodes, "parity": parity, "text": text, "checks": checks,
            "probe": sequences.probe().tolist()}  # fmt: skip


def _write_encoder(encoder: Any, folder: Path, precision: str, opset: int) -> dict[str, Any] | None:
    if encoder is None:
        return None
    if not isinstance(encoder, HFEncoder):
        encoder.save(folder)
        kind = "bag" if encoder.name in BAGS else "zeros"
        return {"kind": kind, "dim": encoder.dim, "policy": encoder.policy}
    if encoder.model.dtype != torch.float32 or encoder.model.device.type != "cpu":
        encoder = load_encoder(encoder.name, encoder.pooling, policy=encoder.policy)
    incremental = parse_policy(encoder.policy).name == "incremental"
    facts = {name: getattr(encoder, name) for name in ENCODER_FACTS}
    names = {p.name for p in encoder.read}
    graph, own = None, "int8" if precision == "int8" else "fp32"
    if incremental or "mask" not in names:  # of an exact text, the mask is a second pass
        layers = sorted({p.layer for p in encoder.read})
        graph = incremental_graph(encoder.model, layers, "pooler" in names, opset, own)
    if graph is None:
        if incremental:
            raise ExportError(
                f"the encoder {encoder.name} has an activation that no ONNX operator is known for "
                "here: export without --encoder, and pass prefix embeddings yourself"
            )
        export_encoder(encoder, folder / ENCODER, opset)
        words = None
    else:
        _describe(graph, incremental_graph, facts)
        words = save_graphs({folder / ENCODER: graph}, folder / ENCODER_WEIGHTS)[WORDS]
    check_graph(folder / ENCODER)
    tokenizer = encoder.tokenizer
    tokenizer.backend_tokenizer.save(str(folder / ENCODER_TOKENIZER))
    described = {
        "kind": "onnx" if graph is None else "trees",
        **facts,
        "depth": encoder.depth,
        "vocabulary": len(encoder.model.get_input_embeddings().weight),
        "words": words,  # where their table begins in the file of weights
        "precision": "fp32" if graph is None else own,
        "tokenizer": describe_tokenizer(tokenizer),
    }
    exported = open_encoder(folder, {"encoder": described, "model": {}}, "cpu", 1)
    return described | {"max_relative_difference": check_encoder(encoder, exported, SAMPLE)}


def _versions() -> dict[str, str]:
    modules = (torch, transformers, tokenizers, onnx, runtime())
    found = {"fusion-lm": fusion_model.__version__, "python": platform.python_version()}
    return found | {module.__name__: str(module.__version__) for module in modules}


def report(manifest: dict[str, Any]) -> list[str]:
    """What was verified, one line each."""
    parity = manifest["verified"]["parity"]
    lines = [
        "onnx.checker and shape inference: sound",
        "log-probabilities against PyTorch in float64, error in nats:",
        *(
            f"  {label:13} mean {parity[f'mean_error_{name}_nats']:.1e}, "
            f"greatest {parity[f'max_error_{name}_nats']:.1e}"
            for name, label in ERRORS.items()
        ),
        f"perplexity on {parity['tokens']} tokens drawn from the model: "
        f"{parity['perplexity_ratio']:.6f} times PyTorch's",
    ]
    if text := manifest["verified"]["text"]:
        lines.append(
            f"on {text['tokens']} tokens of a novel, with their own embeddings: perplexity "
            f"{text['perplexity_ratio']:.4f} times PyTorch's, error in nats mean "
            f"{text['mean_error_nats']:.1e}, greatest {text['max_error_nats']:.2f}"
        )
    if manifest["encoder"] and "max_relative_difference" in manifest["encoder"]:
        difference = manifest["encoder"]["max_relative_difference"]
        lines.append(f"encoder against PyTorch: vectors differ by {difference:.1e} of their size")
    return lines
