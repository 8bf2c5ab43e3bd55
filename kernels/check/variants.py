"""The kernel configurations that ship, as they are compiled ahead of time.

They come from the same pure functions that choose at run time: hidden widths 512, 650, 768, 1024,
1500 and 2048, batches 8 to 256, bfloat16 throughout, float16 and float32 where they differ.
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from fusion_model.kernels.triton.configs import (
    KNOWN_CHIPS,
    padded,
    sequence_backward_config,
    sequence_config,
    step_units,
)

WIDTHS = (512, 650, 768, 1024, 1500, 2048)
BATCHES = (8, 16, 32, 64, 128, 256)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
TYPES = (torch.bfloat16, torch.float16, torch.float32)
IDS = {"p_ids": "*i64", "p_targets": "*i64", "p_tokens": "*i64", "p_seed": "*i64",
       "p_keep": "*u8", "p_done": "*u8", "p_count": "*i32"}  # fmt: skip
FLOATS = ("p_c", "p_c_saved", "p_c_next", "p_c_before", "p_dc", "p_held", "p_max", "p_sum", "p_hit",
          "p_lse", "p_upstream", "p_logits", "p_temperature")  # fmt: skip

LAUNCH = ("num_warps", "num_stages", "enable_fp_fusion", "launch_cooperative_grid")
FORWARD = "triton.lstm_sequence:sequence_forward_kernel"
BACKWARD = "triton.lstm_sequence_backward:sequence_backward_kernel"


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time constants.

    Attributes:
        home: `module:kernel`, imported when it is compiled.
        signature: argument to Triton type.
        options: of the launch: num_warps and so on.
        spins: programs wait for each other.
        products: tensor cores must be used.
    """

    name: str
    home: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, Any]
    spins: bool = False
    products: bool = True

    def kernel(self) -> Any:
        module, name = self.home.split(":")
        return getattr(importlib.import_module(f"fusion_model.kernels.{module}"), name)


def make(
    name: str,
    home: str,
    dtype: torch.dtype,
    settings: Mapping[str, Any],
    spins: bool = False,
    products: bool = True,
) -> Variant:
    """A variant whose pointers are of `dtype`, but for those known to be float32 or integer."""
    variant = Variant(f"{name} {NAMES[dtype]}", home, {}, {}, {}, spins, products)
    signature = {}
    for argument in variant.kernel().arg_names:
        if argument.startswith("p_"):
            own = "*fp32" if argument in FLOATS else f"*{NAMES[dtype]}"
            signature[argument] = IDS.get(argument, own)
        elif argument not in settings:
            signature[argument] = "i32"
    if home.endswith(":decode_choose"):
        signature["p_count"] = "*i64"
    options = {k: v for k, v in settings.items() if k in LAUNCH} | {"enable_fp_fusion": True}
    if spins:
        options["launch_cooperative_grid"] = True
    constants = {k: v for k, v in settings.items() if k not in LAUNCH}
    return replace(variant, signature=signature, constants=constants, options=options)


def _sequences(chip: int) -> Iterator[Variant]:
    from fusion_model.kernels.triton.lstm_sequence import sequence_constants

    modes = {
        "table": {"TABLE": True, "HAS_KEEP": False, "SAVE": False},
        "train": {"TABLE": False, "HAS_KEEP": True, "SAVE": True},
    }
    seen = set()
    for dtype in TYPES:
        for hidden in WIDTHS if dtype == torch.bfloat16 else (512, 768):
            for batch in BATCHES:
                config = sequence_config(KNOWN_CHIPS[chip], hidden, batch, dtype)
                if config is None or (dtype, hidden, config) in seen:
                    continue
                seen.add((dtype, hidden, config))
                width = padded(hidden, config.units)
                settings = sequence_constants(config, dtype, width)
                shape = f"{hidden} U{config.units} B{config.columns}"
                back = sequence_backward_config(KNOWN_CHIPS[chip], hidden, batch, dtype)
                for mode, flags in modes.items():
                    if mode == "table" or (back is not None and back.units == config.units):
                        name = f"sequence {mode} {shape}"
                        yield make(name, FORWARD, dtype, settings | flags, spins=True)
            back = sequence_backward_config(KNOWN_CHIPS[chip], hidden, 16, dtype)
            if back is not None:
                settings = sequence_constants(back, dtype, padded(hidden, back.units))
                shape = f"{hidden} U{back.units} B{back.columns}"
                settings["HAS_KEEP"] = True
                yield make(f"sequence backward {shape}", BACKWARD, dtype, settings, spins=True)


def _rows() -> Iterator[Variant]:
    from fusion_model.kernels.triton.lstm_step import backward_constants, forward_constants

    modes = {
        "decode": {"INPUT": 2, "HAS_KEEP": False, "SAVE": False},
        "train": {"INPUT": 1, "HAS_KEEP": True, "SAVE": True},
    }
    step = "triton.lstm_step:rows_"
    for dtype in TYPES:
        for hidden in WIDTHS if dtype == torch.bfloat16 else (768,):
            for rows in (16, 64, 8192):
                units, shape = step_units(rows, hidden), f"{hidden} N{rows}"
                sizes = rows, dtype, padded(hidden, units), units
                for mode, flags in modes.items():
                    settings = forward_constants(*sizes) | flags
                    yield make(f"rows {mode} {shape}", f"{step}forward", dtype, settings)
            settings = backward_constants(padded(hidden, units), units) | {"HAS_KEEP": True}
            name = f"rows backward {hidden}"
            yield make(name, f"{step}backward", dtype, settings, products=False)


def _decode() -> Iterator[Variant]:
    from fusion_model.kernels.triton.decode import LARGEST, linear_constants

    for dtype in TYPES:
        for rows in (1, 64):
            for fusion, outputs, width in ((0, 8192, 512), (1, 512, 768), (2, 768, 768)):
                settings = linear_constants(rows, outputs, width, dtype)
                settings |= {"STRIDE": width, "FUSION": fusion, "ROWS": fusion > 0}
                name = f"{('vocabulary', 'projection', 'gate')[fusion]} N{rows}"
                yield make(name, "triton.decode:decode_linear", dtype, settings)
    for mode, greedy in (("greedy", True), ("sample top k", False)):
        settings = {"GREEDY": greedy, "TOP_K": not greedy, "BLOCK_V": LARGEST, "num_warps": 8}
        yield make(mode, "triton.decode:decode_choose", torch.float32, settings, products=False)


def _surprisal() -> Iterator[Variant]:
    from fusion_model.kernels.triton.linear_cross_entropy import surprisal_constants

    for dtype in TYPES:
        settings = surprisal_constants(512, dtype, True)
        for kernel in ("surprisal_forward", "surprisal_backward"):
            name = kernel.replace("_", " ")
            yield make(name, f"triton.linear_cross_entropy:{kernel}", dtype, settings)


def _checks() -> Iterator[Variant]:
    """What only `fusion-lm gpu-check` runs, as it runs there."""
    alone: dict[str, dict[str, Any]] = {
        "empty_steps": {"num_warps": 4, "launch_cooperative_grid": True},
        "nothing": {"num_warps": 4},
        "read_all": {"BLOCK": 4096, "num_warps": 8},
    }
    for kernel, settings in alone.items():
        home = f"check.spin_kernels:{kernel}"
        yield make(f"check {kernel}", home, torch.int32, settings, products=False)


def variants(chip: int) -> list[Variant]:
    """What ships for a chip: 80, 90 or 100."""
    return [*_surprisal(), *_rows(), *_decode(), *_checks(), *_sequences(chip)]
