"""What `fusion-lm profile` does: open a model, profile it, describe what was measured where."""

import sys
from collections.abc import Sequence
from typing import Any

from fusion_model.benchmarks.measure.machine import describe, optional, where
from fusion_model.benchmarks.profile.engines import LSTM, VOCABULARY, OnnxEngine, TorchEngine
from fusion_model.benchmarks.profile.latency import Profile, profile, prompts_of, share_out, summary
from fusion_model.benchmarks.profile.spans import Recorder

from fusion_model import progress
from fusion_model.data.text import read_documents
from fusion_model.prefixes.planner import check_causal


def _energy(device: str) -> float | None:
    """Joules that the GPU has used since its driver was loaded; None without NVML."""
    if device == "cpu":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        number = int(device.partition(":")[2] or 0)
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
    except Exception:  # not installed, or a GPU that does not count
        return None


def _memory(device: str) -> dict[str, float]:
    found = {}
    if psutil := optional("psutil"):
        found["process_mb"] = round(psutil.Process().memory_info().rss / 1e6, 1)
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        found["peak_mb"] = round(most / 1e6, 1)
    if device != "cpu":
        torch = optional("torch")
        if torch and torch.cuda.is_available():
            found["gpu_peak_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return found


def profile_model(
    lm: Any, name: str, engine: str, text: Sequence[str], settings: dict[str, int]
) -> tuple[dict[str, Any], Profile]:
    """Everything for JSON, and the passes themselves, for a trace.

    Args:
        lm: a `FusionLM` (`engine` "torch") or an `OnnxFusionLM` ("onnx").
        name: of the model, for the title.
        settings: `runs`, `tokens`, `batch` and `prompt_words` of `latency.profile`.

    Raises:
        FusionLMError: a text too short; a model that cannot generate.
    """
    sentences = [s for document in read_documents(text) for s in document.sentences]
    check_causal(lm.planner)
    exported = engine == "onnx"
    driven = OnnxEngine(lm) if exported else TorchEngine(lm)
    device = lm.device if exported else str(lm.model.device)
    before = _energy(device)
    waits = None  # ONNX Runtime waits for the GPU by itself
    if not exported and device.startswith("cuda"):
        import torch

        waits = torch.cuda.synchronize
    recorder, runs, batch = Recorder(synchronize=waits), settings["runs"], settings["batch"]
    with progress.track("profile", runs + min(runs, -(-len(sentences) // batch))) as update:
        found = profile(driven, sentences, **settings, recorder=recorder, progress=update)
    after = _energy(device)
    longest = max(len(sentence.split()) for sentence in sentences)
    if longest < settings["prompt_words"]:
        progress.note(f"no sentence has {settings['prompt_words']} words: prompts have {longest}")
    if isinstance(driven, OnnxEngine) and device == "cpu":
        prompts = prompts_of(sentences, batch, settings["prompt_words"])
        step, sequence = driven.vocabulary_shares(prompts, sentences[:batch])
        share_out(found.generation, step, LSTM, VOCABULARY)
        share_out(found.scoring, sequence, LSTM, VOCABULARY)
    machine = describe(device, lm.threads if exported else None)
    library = "onnxruntime" if exported else "torch"
    described: dict[str, Any] = {
        "title": f"{name}, {engine}: {where(machine, library)}",
        "machine": machine,
        "settings": settings
        | {"model": name, "engine": engine, "device": device}
        | {"text": list(text), "sentences": len(sentences)},
    }
    config = getattr(getattr(lm, "model", None), "config", None)
    if config is not None:
        described["settings"]["backend"] = lm.model.backend
    if lm.planner is not None:
        described["settings"]["policy"] = lm.planner.encoder.policy
    described |= summary(found, batch)
    described["memory"] = _memory(device)
    energy = None if before is None or after is None else after - before
    return described | {"energy_joules": energy}, found
