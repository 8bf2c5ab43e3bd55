"""Devices and dtypes by name. PyTorch is imported when one is asked for: an export needs none."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread, unless OMP_NUM_THREADS says otherwise.

    For text that is made token by token: a second thread gains nothing (5.5 ms a token of the
    model that ships either way), and on a busy machine the two wait for each other (150 ms
    against 20).
    """
    import torch

    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
