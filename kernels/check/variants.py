"""The launches of `fusion-lm gpu-check`, recorded in place of being made, to be compiled ahead.

Its checks and timed rows run as they are, on tensors without memory: hidden widths from 5 to 1500,
batches from 1 to 300, all dtypes. That is for sm_90; for sm_80 and sm_100 it is those of them at
widths from 512 on, without float16, whose code differs from bfloat16's in the type of a product
alone. No size of a vocabulary is compiled in.
"""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any
from unittest import mock

import torch
from fusion_model.kernels import backend
from fusion_model.kernels.check import cases, decode_cases
from fusion_model.kernels.triton import configs, guards
from torch import Tensor, nn

D, H, V, STEPS = 512, 768, 8192, 3  # the published sizes
KINDS = ("bf16", "fp16")  # that are timed
OPERATIONS = ("sequence", "prefix", "surprisal")
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


def _checked(chip: int) -> Iterator[str]:
    """Names of what `gpu-check` checks; what is launched until the next name is of this one."""
    meta = torch.device("meta")

    def wanted(dtype: str, hidden: int) -> bool:
        return chip == 90 or (dtype != "fp16" and hidden >= 512)

    found = [case for operation in OPERATIONS for case in cases.cases(operation)]
    for case in [*found, *cases.REPEATED]:
        if wanted(case.dtype, case.hidden):
            yield str(case)
            leaves, run = cases.build(case, meta)
            cases.outputs(case, leaves, run, cases.TYPES[case.dtype], "triton")
    for token in [*decode_cases.cases(), *decode_cases.REPEATED]:
        if wanted(token.dtype, token.hidden):
            yield str(token)
            decode_cases.decoder(token, meta)[0].step()


def _timed(kinds: Iterable[str]) -> Iterator[str]:
    """The same of what `benchmarks.gpu.timing` times."""
    from fusion_model.kernels.triton.decoder import Decoder, DecodeWeights
    from fusion_model.kernels.triton.linear_cross_entropy import target_log_probs
    from fusion_model.kernels.triton.lstm import lstm_sequence, lstm_tokens, prefix_lstm

    for kind in kinds:
        dtype = cases.TYPES[kind]

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, requires_grad=len(shape) > 1)

        sizes = [(1, H), (16, H), (64, H), (256, H)]
        for batch, hidden in sizes + [(16, 650), (64, 1500)] * (kind == "bf16"):
            weights = nn.LSTM(D, hidden, dtype=dtype).all_weights
            x, state = empty(batch, STEPS, D), (empty(batch, 1, hidden),) * 2
            yield f"timed tokens {kind} B{batch} H{hidden}"
            ids = torch.zeros(batch, STEPS, dtype=torch.int64)
            lstm_tokens(ids, empty(V, D), state, weights)  # of one embedding a table is kept
            yield f"timed training {kind} B{batch} H{hidden}"
            lstm_sequence(x, state, weights)[0].sum().backward()
        weights, head = nn.LSTM(D, H, dtype=dtype).all_weights, (empty(V, D), empty(V))
        x, rows = empty(328, STEPS, D), empty(328, STEPS, H)
        yield f"timed prefixes {kind}"
        with torch.no_grad():
            prefix_lstm(x, rows, rows, weights)
        prefix_lstm(x, rows, rows, weights).sum().backward()
        yield f"timed surprisal {kind}"
        target_log_probs(
            empty(8192, D), *head, torch.zeros(8192, dtype=torch.int64)
        ).sum().backward()
        for batch in (1, 16):
            yield f"timed token {kind} B{batch}"
            weights_of_all = DecodeWeights(head[0], weights, empty(D, H), *head)
            Decoder(weights_of_all, batch, STEPS).step()


def variants(chip: int) -> list[Variant]:
    """What ships for a chip: 80, 90 or 100; each once, by the first shape that launches it."""
    return recorded(chip, chain(_checked(chip), _timed(KINDS if chip == 90 else KINDS[:1])))


def recorded(chip: int, launches: Iterable[str]) -> list[Variant]:
    """What is launched on tensors of the device `meta` between the names that are given."""
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
            (backend, "obstacle", lambda *_: None),
            (torch, "is_autocast_enabled", lambda *_: False),  # it knows no such device
            (torch, "autocast", lambda *_, **__: nullcontext()),
            # Else only the shapes of what an operator gives would be made.
            *((operator, "_abstract_fn", operator._init_fn) for operator in operators),
        ]:
            stack.enter_context(mock.patch.object(home, name, value))
        stack.enter_context(torch.device("meta"))
        for what in launches:  # noqa: B007
            pass
    return list(found.values())
