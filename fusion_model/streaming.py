"""The documented import path of `fusion_model.prefixes.stream`."""

from fusion_model.prefixes.stream import PrefixStream

__all__ = ["PrefixStream"]
