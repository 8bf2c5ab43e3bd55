"""The documented import path of `fusion_model.prefixes.planner`."""

from fusion_model.data.corpus import Corpus
from fusion_model.prefixes.embed import embed_corpus
from fusion_model.prefixes.planner import PrefixPlanner, check_causal

__all__ = ["Corpus", "PrefixPlanner", "check_causal", "embed_corpus"]
