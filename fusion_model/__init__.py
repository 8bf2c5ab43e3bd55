"""LSTM language models that fuse embeddings of the prefix from a pretrained encoder."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion_model.config import FusionLMConfig as FusionLMConfig
    from fusion_model.encoders import load_encoder as load_encoder
    from fusion_model.language_model import FusionLM as FusionLM
    from fusion_model.loading import load as load
    from fusion_model.model import FusionLMForCausalLM as FusionLMForCausalLM
    from fusion_model.model import FusionLMOutput as FusionLMOutput
    from fusion_model.names import FUSIONS as FUSIONS
    from fusion_model.prefixes.planner import PrefixPlanner as PrefixPlanner
    from fusion_model.prefixes.stream import PrefixStream as PrefixStream

__version__ = "0.1.0"
_HOMES = {
    "FUSIONS": "names",
    "FusionLM": "language_model",
    "FusionLMConfig": "config",
    "FusionLMForCausalLM": "model",
    "FusionLMOutput": "model",
    "PrefixPlanner": "prefixes.planner",
    "PrefixStream": "prefixes.stream",
    "load": "loading",
    "load_encoder": "encoders",
}
__all__ = list(_HOMES)


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
