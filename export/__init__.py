"""ONNX export, and a runtime that needs neither PyTorch nor transformers.

`export_model` writes a folder; `OnnxFusionLM` runs it. Each is imported when it is first used,
since the first needs PyTorch and the second must not.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion_model.export.exporter import export_model
    from fusion_model.export.runtime.model import OnnxFusionLM

__all__ = ["OnnxFusionLM", "export_model"]
_HOMES = {"OnnxFusionLM": "runtime.model", "export_model": "exporter"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
