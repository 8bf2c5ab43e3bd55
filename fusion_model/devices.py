"""Devices and dtypes by name. PyTorch is imported when one is asked for: an export needs none."""

from typing import TYPE_CHECKING

from fusion_model.errors import EncoderError, FusionLMError, first_line

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "auto")


def resolve_dtype(dtype: str, device: "torch.device | str") -> "torch.dtype":
    """`auto` is bfloat16 where the processor multiplies it in hardware, else float32."""
    import torch

    if dtype not in DTYPES:
        raise EncoderError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return torch.float32 if dtype == "float32" else getattr(torch, dtype)
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def resolve_device(name: str) -> str:
    """`auto` is a GPU where there is one; any other is tried."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        on = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = first_line(error)
        raise FusionLMError(f"the device {name!r} cannot be used here: {why}") from None
    if on.type == "meta":
        raise FusionLMError("the device 'meta' holds no numbers: choose cpu or cuda")
    return name
