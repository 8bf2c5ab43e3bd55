"""LSTM language models that fuse embeddings of the prefix from a pretrained encoder."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion_model.config import FUSIONS, FusionLMConfig
    from fusion_model.encoders import load_encoder
    from fusion_model.language_model import FusionLM
    from fusion_model.loading import load
    from fusion_model.model import FusionLMForCausalLM, FusionLMOutput
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
    "FUSIONS": "config",
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


def _register() -> None:
    """Make transformers' Auto classes know the model, where transformers can run it."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    from fusion_model.config import FusionLMConfig
    from fusion_model.model import FusionLMForCausalLM

    AutoConfig.register("fusion_lm", FusionLMConfig)
    AutoModelForCausalLM.register(FusionLMConfig, FusionLMForCausalLM)


_register()
