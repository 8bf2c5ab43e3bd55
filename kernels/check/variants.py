"""The kernel configurations that ship, as they are compiled ahead of time.

They come from the same pure functions that choose at run time: hidden widths 512, 650, 768, 1024,
1500 and 2048, batches 8 to 256, bfloat16 throughout, float16 and float32 where they differ.
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    scalars: tuple[str, ...],
    settings: Mapping[str, Any],
    spins: bool = False,
    products: bool = True,
) -> Variant:
    """A variant whose pointers are of `dtype`, but for those known to be float32 or integer."""
    module, kernel = home.split(":")
    found = importlib.import_module(f"fusion_model.kernels.{module}")
    signature = dict.fromkeys(scalars, "i32")
    for argument in getattr(found, kernel).arg_names:
        if argument.startswith("p_"):
            own = "*fp32" if argument in FLOATS else f"*{NAMES[dtype]}"
            signature[argument] = IDS.get(argument, own)
    if kernel == "decode_choose":
        signature["p_count"] = "*i64"
    launch = ("num_warps", "num_stages", "enable_fp_fusion", "launch_cooperative_grid")
    options = {k: v for k, v in settings.items() if k in launch}
    options["enable_fp_fusion"] = True
    if spins:
        options["launch_cooperative_grid"] = True
    constants = {k: v for k, v in settings.items() if k not in options}
    return Variant(f"{name} {NAMES[dtype]}", home, signature, constants, options, spins, products)


def _sequences(chip: int) -> Iterator[Variant]:
    from fusion_model.kernels.triton.lstm_sequence import sequence_constants, sequence_kernel
    from fusion_model.kernels.triton.lstm_sequence_backward import backward_settings

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
                settings = sequence_constants(config, dtype, width) | {"LIMIT": 0}
                kernel = sequence_kernel(config).__name__
                shape = f"{hidden} U{config.units} B{config.columns}"
                back = sequence_backward_config(KNOWN_CHIPS[chip], hidden, batch, dtype)
                for mode, flags in modes.items():
                    if mode == "train" and (back is None or back.units != config.units):
                        continue
                    yield make(
                        f"sequence {mode} {shape}", f"triton.lstm_sequence:{kernel}", dtype,
                        ("steps", "batch", "one"), settings | flags, spins=True,
                    )  # fmt: skip
            back = sequence_backward_config(KNOWN_CHIPS[chip], hidden, 16, dtype)
            if back is not None:
                settings = backward_settings(back, dtype, padded(hidden, back.units))
                yield make(
                    f"sequence backward {hidden} U{back.units} B{back.columns}",
                    "triton.lstm_sequence_backward:sequence_backward_kernel", dtype,
                    ("steps", "batch"), settings | {"HAS_KEEP": True, "LIMIT": 0}, spins=True,
                )  # fmt: skip


def _rows() -> Iterator[Variant]:
    from fusion_model.kernels.triton.lstm_step import backward_constants, forward_constants

    for dtype in TYPES:
        for hidden in WIDTHS if dtype == torch.bfloat16 else (768,):
            for rows in (16, 64, 8192):
                units = step_units(rows, hidden)
                width = padded(hidden, units)
                for mode, flags in {
                    "decode": {"INPUT": 2, "HAS_KEEP": False, "SAVE": False},
                    "train": {"INPUT": 1, "HAS_KEEP": True, "SAVE": True},
                }.items():
                    settings = forward_constants(rows, dtype, width, units) | flags
                    yield make(
                        f"rows {mode} {hidden} N{rows}", "triton.lstm_step:rows_forward", dtype,
                        ("n", "batch"), settings,
                    )  # fmt: skip
                settings = backward_constants(rows, dtype, width, units) | {"HAS_KEEP": True}
                yield make(
                    f"rows backward {hidden} N{rows}", "triton.lstm_step:rows_backward", dtype,
                    ("n", "n_next", "batch"), settings, products=settings["FUSED"],
                )  # fmt: skip


def _decode() -> Iterator[Variant]:
    from fusion_model.kernels.triton.decode import linear_constants

    for dtype in TYPES:
        for rows in (1, 64):
            for fusion, outputs, width in ((0, 8192, 512), (1, 512, 768), (2, 768, 768)):
                settings = linear_constants(rows, outputs, width, dtype)
                settings |= {"STRIDE": width, "FUSION": fusion, "ROWS": fusion > 0}
                name = f"{('vocabulary', 'projection', 'gate')[fusion]} N{rows}"
                scalars = ("n", "outputs")
                yield make(name, "triton.decode:decode_linear", dtype, scalars, settings)
    for mode, greedy in (("greedy", True), ("sample top k", False)):
        settings = {"GREEDY": greedy, "TOP_K": not greedy, "BLOCK_V": 8192, "num_warps": 8}
        yield make(
            mode, "triton.decode:decode_choose", torch.float32,
            ("v", "batch", "steps", "k", "eos", "pad"), settings, products=False,
        )  # fmt: skip


def _surprisal() -> Iterator[Variant]:
    from fusion_model.kernels.triton.linear_cross_entropy import surprisal_constants

    for dtype in TYPES:
        settings = surprisal_constants(512, dtype, True)
        for kernel in ("surprisal_forward", "surprisal_backward"):
            name = kernel.replace("_", " ")
            yield make(name, f"triton.linear_cross_entropy:{kernel}", dtype, ("n", "v"), settings)


def _checks() -> Iterator[Variant]:
    """What only `fusion-lm gpu-check` runs, as it runs there: floors, and debug builds."""
    from fusion_model.kernels.check.hangs import DEBUG, LOOKS, WIDTH
    from fusion_model.kernels.triton.lstm_sequence import sequence_constants
    from fusion_model.kernels.triton.lstm_sequence_backward import backward_settings

    kind = torch.int32
    scalars = {"empty_steps": ("steps",), "wait_in_vain": ("target",), "nothing": (),
               "read_all": ("blocks", "rounds")}  # fmt: skip
    settings: dict[str, dict[str, Any]] = {
        "empty_steps": {"LIMIT": 0, "num_warps": 4, "launch_cooperative_grid": True},
        "wait_in_vain": {"LIMIT": LOOKS, "num_warps": 4},
        "nothing": {"num_warps": 4},
        "read_all": {"BLOCK": 4096, "num_warps": 8},
    }
    for kernel, own in settings.items():
        home = f"check.spin_kernels:{kernel}"
        yield make(f"check {kernel}", home, kind, scalars[kernel], own, products=False)
    flags = {"TABLE": False, "HAS_KEEP": False, "SAVE": False, "LIMIT": LOOKS}
    forward, backward = DEBUG
    yield make(
        "sequence debug", "triton.lstm_sequence:sequence_forward_split", torch.bfloat16,
        ("steps", "batch", "one"), sequence_constants(forward, torch.bfloat16, WIDTH) | flags,
        spins=True,
    )  # fmt: skip
    own = backward_settings(backward, torch.bfloat16, WIDTH) | {"HAS_KEEP": False, "LIMIT": LOOKS}
    yield make(
        "sequence backward debug", "triton.lstm_sequence_backward:sequence_backward_kernel",
        torch.bfloat16, ("steps", "batch"), own, spins=True,
    )  # fmt: skip


def variants(chip: int) -> list[Variant]:
    """What ships for a chip: 80, 90 or 100."""
    return [*_surprisal(), *_rows(), *_decode(), *_checks(), *_sequences(chip)]
