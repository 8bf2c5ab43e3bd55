"""Launches that are checked before they are made, and kernels that are held to PyTorch's result the
first time that they run."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fusion_model.kernels.triton.configs import Chip, chip_of, interpreting
from torch import Tensor


class LaunchRefused(RuntimeError):
    """A launch that would not fit, found out before it is made."""


def check_grid(chip: Chip, programs: int, kernel: str) -> None:
    """A spinning grid must be on the chip as a whole, or it waits for ever.

    Raises:
        LaunchRefused: more programs than multiprocessors, or no cooperative launches.
    """
    if not chip.cooperative:
        raise LaunchRefused(f"{kernel}: this device refuses cooperative launches")
    if programs > chip.sms:
        raise LaunchRefused(
            f"{kernel}: {programs} programs do not fit on {chip.sms} multiprocessors at once"
        )


Runner = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], None]


def _run(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    kernel[grid](*args, **options)


spinning_runner: Runner = _run
"""How persistent kernels start. The interpreter runs programs one after another, so that a
kernel which waits for its neighbours never ends. Tests put a runner here that gives each program
a process of its own, and then let `INTERPRETER` be cooperative."""


def launch_spinning(
    kernel: Any, grid: tuple[int, int], args: tuple[Any, ...], device: torch.device, **options: Any
) -> None:
    """Launch a kernel whose programs wait for each other: cooperative, and only if it fits."""
    check_grid(chip_of(device), grid[0] * grid[1], kernel.fn.__name__)
    cooperative = {"launch_cooperative_grid": True, "enable_fp_fusion": True}
    spinning_runner(kernel, grid, args, options | cooperative)


checked: dict[tuple[Any, ...], bool] = {}
"""(kernel, device, configuration) -> whether it agreed with the reference."""
refused: set[tuple[Any, ...]] = set()
"""What `trusted` has answered with no, since somebody cleared this."""


def trusted(
    name: str,
    dtype: torch.dtype,
    key: tuple[Any, ...],
    device: torch.device,
    trial: Callable[[], Iterable[tuple[Tensor, Tensor]]],
) -> bool:
    """Whether a kernel agrees with the equations here; found out once a device and configuration.

    A kernel that fails, or disagrees, is not used: a warning names it, and the caller computes
    without it. While a CUDA graph is being captured nothing can be compared; what was not
    checked before is then taken on trust.

    Args:
        dtype: of the products: how far results may be apart.
        key: what else a configuration is known by.
        trial: runs the kernel and the equations; pairs of what they gave.
    """
    if interpreting():
        return True  # the tests compare every kernel with the reference themselves
    where = (name, str(device), dtype, *key)
    if where not in checked:
        if torch.cuda.is_current_stream_capturing():
            return True
        checked[where] = True  # the trial itself comes through here
        try:
            pairs = list(trial())
            if not all(bool(expected.isfinite().all()) for _, expected in pairs):
                del checked[where]  # an overflow, as of a loss scale: nothing to compare
                refused.add(where)
                return False
            if not all(close(got, expected, dtype) for got, expected in pairs):
                raise ArithmeticError("its results differ from the reference's")
        except Exception as error:  # whatever is raised: what happens else is right
            checked[where] = False
            warnings.warn(
                f"{name} {(dtype, *key)} is not used on {device}, PyTorch computes "
                f"instead: {type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
    if not checked[where]:
        refused.add(where)
    return checked[where]


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Agreement for a self-check: far from what a wrong kernel gives, wide for rounding."""
    tolerance = 1e-4 if dtype == torch.float32 else 4e-2
    got, expected = got.float(), expected.float()
    # Of the largest number, however small that is: gradients of a mean are.
    scale = float(expected.abs().max()) + torch.finfo(torch.float32).tiny
    return bool((got - expected).abs().max() <= tolerance * scale)
