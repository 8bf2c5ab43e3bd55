"""bfloat16 in Triton's interpreter, put right.

The interpreter keeps bfloat16 as 16-bit integers. Its `dot` multiplies these integers, its
arithmetic does too, and its cast from float32 cuts off instead of rounding to the nearest. Here
`dot` gets the numbers that the bits stand for, casts round as the hardware does, and arithmetic on
bfloat16 raises: a kernel may load, store, cast, select and multiply matrices, no more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


def _widened(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray) -> np.ndarray:
    shape = np.shape(values)
    found = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(torch.bfloat16)
    return found.view(torch.int16).numpy().view(np.uint16).reshape(shape)


@contextmanager
def right_bfloat16() -> Iterator[list[str]]:
    """Patches the interpreter; yields a list that names every operation seen on bfloat16."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    seen: list[str] = []
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def kind(handle: Any) -> Any:
        return handle.dtype.scalar

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        operands = []
        for handle in (a, b):
            if kind(handle) == tl.bfloat16:
                seen.append("dot")
                handle = TensorHandle(_widened(handle.data), tl.float32)
            operands.append(handle)
        return dot(self, *operands, *rest)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if kind(source) == tl.bfloat16:
            seen.append("widen")
            assert target.scalar == tl.float32, target
            return TensorHandle(_widened(source.data), tl.float32)
        if target.scalar == tl.bfloat16:
            seen.append("round")
            assert kind(source) == tl.float32, source.dtype
            return TensorHandle(_rounded(source.data), tl.bfloat16)
        return cast(self, source, target)

    def refusing(name: str) -> Any:
        original = getattr(InterpreterBuilder, name)

        def operation(self: Any, *given: Any) -> Any:
            for handle in given:
                if isinstance(handle, TensorHandle) and kind(handle) == tl.bfloat16:
                    raise NotImplementedError(f"{name} on bfloat16")
            return original(self, *given)

        return operation

    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor: Any, scope: Any) -> None:
        """triton 3.6 cannot make a loop's bound of an array of one element with numpy 2.4."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    patches = {"create_dot": create_dot, "cast_impl": cast_impl}
    patches |= {name: refusing(name) for name in ("binary_op", "unary_op", "create_fma")}
    index = mock.patch.object(interpreter, "_patch_lang_tensor", with_index)
    with mock.patch.multiple(InterpreterBuilder, **patches), index:
        yield seen
