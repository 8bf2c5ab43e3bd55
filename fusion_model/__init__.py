"""LSTM language models that fuse embeddings of the prefix from a pretrained encoder."""

from transformers import AutoConfig, AutoModelForCausalLM

from fusion_model.config import FUSIONS, FusionLMConfig
from fusion_model.language_model import FusionLM, load
from fusion_model.model import FusionLMForCausalLM, FusionLMOutput

AutoConfig.register("fusion_lm", FusionLMConfig)
AutoModelForCausalLM.register(FusionLMConfig, FusionLMForCausalLM)

__version__ = "0.1.0"
__all__ = [
    "FUSIONS",
    "FusionLM",
    "FusionLMConfig",
    "FusionLMForCausalLM",
    "FusionLMOutput",
    "load",
]
