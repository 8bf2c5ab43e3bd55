"""LSTM language models that fuse embeddings of the prefix from a pretrained encoder."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion_model.config import FusionLMConfig
    from fusion_model.encoders import load_encoder
    from fusion_model.language_model import FusionLM
    from fusion_model.loading import load
    from fusion_model.model import FusionLMForCausalLM, FusionLMOutput
    from fusion_model.names import FUSIONS
    from fusion_model.prefixes.planner import PrefixPlanner
    from fusion_model.prefixes.stream import PrefixStream

__version__ = "0.1.0"
__all__ = [
    "FUSIONS",
    "FusionLM",
    "FusionLMConfig",
    "FusionLMForCausalLM",
    "FusionLMOutput",
    "PrefixPlanner",
    "PrefixStream",
    "load",
    "load_encoder",
]
_HOMES = {
    "FUSIONS": "names",
    "FusionLMConfig": "config",
    "FusionLM": "language_model",
    "load": "loading",
    "FusionLMForCausalLM": "model",
    "FusionLMOutput": "model",
    "PrefixPlanner": "prefixes.planner",
    "PrefixStream": "prefixes.stream",
    "load_encoder": "encoders",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: an exported model needs no PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def _is_the_command() -> bool:
    """Whether `fusion-lm` or `python -m fusion_model` imports this: it answers before PyTorch is
    there, and each command imports what it needs."""
    program = next(iter(getattr(sys, "argv", ())), "")
    return program == "-m" or Path(program).stem == "fusion-lm"


# transformers' Auto classes know the model once it is imported.
if not _is_the_command() and all(map(importlib.util.find_spec, ("torch", "transformers"))):
    importlib.import_module("fusion_model.model")
