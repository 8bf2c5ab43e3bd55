"""The launches that ship, recorded in place of being made, to be compiled ahead of time.

The operations run as they are, on tensors without memory: what is compiled is what a GPU would be
asked for at hidden widths 512, 650, 768, 1024 and 1500 and at batches from 1 to 256, in
bfloat16 throughout, in float16 and float32 at two widths. No size of a vocabulary is compiled in.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from fusion_model.kernels.triton import configs, guards
from torch import Tensor, nn

D, H, V, STEPS = 512, 768, 8192, 3
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
         torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time constants.

    Attributes:
        home: `module:kernel`, imported when it is compiled.
        signature: argument to Triton type.
        options: of the launch: num_warps and so on.
    """

    name: str
    home: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]

    @property
    def spins(self) -> bool:
        """Whether programs wait for each other."""
        return bool(self.options.get("launch_cooperative_grid"))

    @property
    def products(self) -> bool:
        """Whether tensor cores must be used."""
        return "PRECISION" in self.constants

    def kernel(self) -> Any:
        module, name = self.home.split(":")
        return getattr(importlib.import_module(module), name)


def _recorded(what: str, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Variant:
    """What a launch asks for: `kernel[grid](*args, **options)`."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | options
    signature, constants = {}, {}
    for parameter in kernel.params:
        value = given.pop(parameter.name)
        if parameter.is_constexpr:
            constants[parameter.name] = value
        else:  # no number is specialised on
            tensor = isinstance(value, Tensor)
            signature[parameter.name] = f"*{NAMES[value.dtype]}" if tensor else "i32"
    home = f"{kernel.fn.__module__}:{kernel.fn.__name__}"
    return Variant(f"{what} {kernel.fn.__name__}", home, signature, constants, given)


def _shapes() -> Iterator[str]:
    """Names of the shapes that matter; what is launched until the next name is of this one."""
    from fusion_model.kernels.triton.decoder import Decoder, DecodeWeights
    from fusion_model.kernels.triton.linear_cross_entropy import target_log_probs
    from fusion_model.kernels.triton.lstm import lstm_sequence, lstm_tokens, prefix_lstm

    modes: list[tuple[str, dict[str, Any]]] = [
        ("plain", {}), ("multiply", {"greedy": False}), ("gate", {"greedy": False, "top_k": 40}),
    ]  # fmt: skip
    for dtype, kind in list(NAMES.items())[:3]:

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, requires_grad=len(shape) > 1)

        head = empty(V, D), empty(V)
        yield f"surprisal {kind}"
        y = torch.zeros(8192, dtype=torch.int64)
        target_log_probs(empty(len(y), D), *head, y).sum().backward()
        for hidden in (512, 650, 768, 1024, 1500) if kind == "bf16" else (512, 768):
            weights = nn.LSTM(D, hidden, dtype=dtype).all_weights
            for batch in (8, 16, 32, 64, 128, 256):
                x, state = empty(batch, STEPS, D), (empty(batch, 1, hidden),) * 2
                yield f"tokens {hidden} B{batch} {kind}"
                ids = torch.zeros(batch, STEPS, dtype=torch.int64)
                lstm_tokens(ids, empty(V, D), state, weights)  # of one embedding a table is kept
                yield f"training {hidden} B{batch} {kind}"
                lstm_sequence(x, state, weights, torch.ones(batch, STEPS))[0].sum().backward()
            yield f"prefixes {hidden} {kind}"
            rows = empty(batch, STEPS, hidden)
            prefix_lstm(x, rows, rows, weights).sum().backward()
        for batch in (1, 64):
            for fusion, choice in modes:
                yield f"{fusion} token B{batch} {kind}"
                layers = nn.LSTM(D, H, dtype=dtype).all_weights
                gate = empty(H, H) if fusion == "gate" else None
                token = DecodeWeights(
                    head[0], layers, empty(D, H), *head, gate, fusion == "multiply"
                )
                Decoder(token, batch, STEPS, **choice).step()


def variants(chip: int) -> list[Variant]:
    """What ships for a chip: 80, 90 or 100; each once, by the first shape that launches it."""
    from fusion_model.kernels.triton import linear_cross_entropy, lstm_operator
    from triton.runtime import JITFunction

    found: dict[Any, Variant] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        made = _recorded(what, kernel, args, options)
        parts = made.signature, made.constants, made.options
        found.setdefault((made.home, *(tuple(p.items()) for p in parts)), made)

    operators: list[Any] = [
        lstm_operator.lstm_rows, lstm_operator.lstm_rows_backward,
        linear_cross_entropy._forward_op, linear_cross_entropy._backward_op,
    ]  # fmt: skip
    with ExitStack() as stack:
        for home, name, value in [
            (JITFunction, "run", record),
            (configs, "INTERPRETER", configs.KNOWN_CHIPS[chip]),
            (guards, "interpreting", lambda: True),  # no kernel is tried
            # Else only the shapes of what an operator gives would be made.
            *((operator, "_abstract_fn", operator._init_fn) for operator in operators),
        ]:
            stack.enter_context(mock.patch.object(home, name, value))
        stack.enter_context(torch.device("meta"))
        for what in _shapes():  # noqa: B007
            pass
    return list(found.values())
