"""A pretrained encoder with its poolings as one ONNX graph: token ids in, vectors out.

The graph is traced from `HFEncoder` itself, so that it pools as the encoder does in PyTorch.
"""

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from fusion_model.encoders.pretrained import HFEncoder
from fusion_model.errors import ExportError, first_line

TRACED = (3, 7)  # N, L of the example; neither 0 nor 1, which a trace takes for constants


class _Pooled(nn.Module):
    """ids [N, L] int64 -> vectors [N, E] float32."""

    def __init__(self, encoder: HFEncoder) -> None:
        super().__init__()
        self.model, self._encoder = encoder.model, encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self._encoder.pooled(input_ids)


def export_encoder(encoder: HFEncoder, path: Path, opset: int) -> None:
    """Write `encoder.onnx`: `input_ids` [N, L] int64 to `prefix_embeds` [N, E] float32.

    All items of a call have the same length, special tokens included, so there is no mask. With
    pooling `static` alone, L is 1.

    Raises:
        ExportError: PyTorch's exporter cannot express this encoder.
    """
    static = encoder.pooling == "static"
    count, length = TRACED
    example = torch.zeros(count, 1 if static else length, dtype=torch.int64)
    axes: dict[int, object] = {0: torch.export.Dim("items", min=1)}
    if not static:
        most = encoder.window - any(p.name == "mask" for p in encoder.poolings)
        axes[1] = torch.export.Dim("length", min=len(encoder.specials), max=most)
    log = logging.getLogger("torch.onnx")  # it warns of operators that no encoder has
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with torch.inference_mode(), warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                _Pooled(encoder),
                (example,),
                input_names=["input_ids"],
                output_names=["prefix_embeds"],
                opset_version=opset,
                dynamic_shapes=(axes,),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            assert program is not None
            program.model.doc_string = (export_encoder.__doc__ or "").partition("\n")[0]
            program.save(path)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        raise ExportError(
            f"the encoder {encoder.name} cannot be exported to ONNX: {first_line(error)}; export "
            "without --encoder, and pass prefix embeddings yourself"
        ) from error
    finally:
        log.setLevel(level)
