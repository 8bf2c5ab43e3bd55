"""Persistent kernels in Triton's interpreter, with real concurrency: one process a program.

The interpreter runs the programs of a grid one after another; a program that waits for its
neighbours would wait for ever. Here every program is forked, tensors lie in shared memory, and
waiting is real.
"""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from fusion_model.kernels.triton import configs, guards

TIMEOUT = 120  # seconds


def _publish(
    builder: Any, asm: str, constraints: str, values: list[Any], *_: Any
) -> SimpleNamespace:
    """The only assembly there is: words are stored where a mask is not 0."""
    assert "@%ours st.relaxed.gpu.global.b32 [$1], $2;" in asm
    addresses, words, mask = values
    addresses.data = addresses.data.view("uint64")
    mask.data = mask.data != 0
    builder.create_masked_store(addresses, words, mask, None, None)
    return SimpleNamespace(get_result=lambda _: words)


def _program(
    index: tuple[int, int], kernel: Any, grid: tuple[int, ...], args: Any, options: Any
) -> None:
    import triton.runtime.interpreter as interpreter

    torch.set_num_threads(1)
    builder = interpreter.interpreter_builder
    set_dim, set_index, load = (
        builder.set_grid_dim,
        builder.set_grid_idx,
        builder.create_masked_load,
    )
    builder.set_grid_dim = lambda *_: set_dim(grid[0], grid[1], 1)
    builder.set_grid_idx = lambda *_: set_index(*index, 0)

    def yielding(*given: Any) -> Any:
        os.sched_yield()  # there are fewer cores than programs
        return load(*given)

    builder.create_masked_load = yielding
    # It would copy every tensor onto itself, over what other programs write meanwhile.
    interpreter.GridExecutor._restore_args_dev = lambda *_: None
    kernel[(1, 1)](*args, **options)


def run_concurrently(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """A `fusion_model.kernels.triton.guards.Runner`. Raises where a program fails or hangs."""
    for tensor in args:
        if isinstance(tensor, torch.Tensor):
            tensor.untyped_storage().share_memory_()
    context = multiprocessing.get_context("fork")
    programs = [
        context.Process(target=_program, args=((x, y), kernel, grid, args, options), daemon=True)
        for x in range(grid[0])
        for y in range(grid[1])
    ]
    for program in programs:
        program.start()
    for program in programs:
        program.join(TIMEOUT)
    codes = [program.exitcode for program in programs]
    for program in programs:
        program.kill()
    if any(code != 0 for code in codes):  # None: still running
        raise RuntimeError(f"programs ended with {codes}")


@contextmanager
def concurrent_programs() -> Iterator[None]:
    """Persistent kernels run, and are chosen, under the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    old = guards.spinning_runner, configs.INTERPRETER
    guards.spinning_runner = run_concurrently
    configs.INTERPRETER = replace(old[1], cooperative=True)
    try:
        with mock.patch.object(InterpreterBuilder, "create_inline_asm", _publish):
            yield
    finally:
        guards.spinning_runner, configs.INTERPRETER = old
