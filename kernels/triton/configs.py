"""Where and how the Triton kernels run: pure functions of chip, shape and dtype.

Nothing here imports triton, so that every choice can be made, and tested, without it.

Notation: B sequences (columns of a step), H hidden width, HP = H rounded up to whole unit blocks,
U hidden units a program. A program of U units owns 4U rows of the recurrent weights.
"""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Chip:
    """What a launch must fit into.

    Attributes:
        capability: 10 * major + minor of the compute capability; 0 for Triton's interpreter.
        sms: multiprocessors: a cooperative grid has at most so many programs here.
        shared: bytes of shared memory that one program may take.
        cooperative: whether the device takes cooperative launches.
    """

    capability: int
    sms: int
    shared: int
    cooperative: bool = True


SHARED = 232_448  # bytes a program may take, where there is wgmma
KNOWN_CHIPS = {  # for compiling ahead of time; at run time the device is asked
    80: Chip(80, 108, 166_912),
    90: Chip(90, 132, SHARED),
    100: Chip(100, 148, SHARED),
}
ANYWHERE = 101_376  # bytes that a program may take on any chip from 8.0 on: 8.6, 8.9, 12.0
INTERPRETER = Chip(0, 64, SHARED, cooperative=False)  # see `spinning_runner`


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for a GPU, as in the tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@functools.cache
def _cuda_chip(index: int) -> Chip:
    p = torch.cuda.get_device_properties(index)
    shared = getattr(p, "shared_memory_per_block_optin", 0)
    # From Volta on every device takes cooperative launches, unless a driver says otherwise (MPS).
    return Chip(10 * p.major + p.minor, p.multi_processor_count, shared, p.major >= 7)


def chip_of(device: torch.device) -> Chip:
    """The chip behind `device`; under the interpreter its own, wherever the tensors are."""
    if device.type == "cuda" and not interpreting():
        index = torch.cuda.current_device() if device.index is None else device.index
        return _cuda_chip(index)
    return INTERPRETER


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are: this makes it theirs."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def chained(chip: Chip) -> dict[str, bool]:
    """Of a launch that follows another: from sm_90 on it comes up while that one still runs.

    `CHAINED` is for the kernel, which waits by `primitives.chain`; `launch_pdl` is Triton's.
    """
    able = chip.capability >= 90
    return {"CHAINED": able, "launch_pdl": able}


def precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply: three tf32 products keep float32's accuracy (about 1e-6)."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


@dataclass(frozen=True)
class TileConfig:
    """One product of matrices: rows x columns x depth of a tile, warps, pipeline stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def settings(self, dtype: torch.dtype) -> dict[str, Any]:
        """Of kernels and launches, but for what the columns are."""
        return {
            "BLOCK_N": self.rows,
            "BLOCK_K": self.depth,
            "PRECISION": precision(dtype),
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }


def step_config(rows: int, dtype: torch.dtype, units: int) -> TileConfig:
    """Forward step: `columns` are units, of four gates each (estimates; nobody measured)."""
    wide = dtype == torch.float32
    if rows <= 64 or units < 32:
        tall, depth = 16 if rows <= 16 else 32 if rows <= 32 else 64, 32 if wide else 128
        warps = 8 if wide and tall * units > 1024 else 4  # more than fits into registers
        return TileConfig(tall, units, depth, warps, deep(tall + 4 * units, depth, dtype))
    return TileConfig(64 if wide else 128, units, 32 if wide else 64, 8, 3 if wide else 4)


def deep(lanes: int, depth: int, dtype: torch.dtype) -> int:
    """Pipeline stages of a product of few rows, which waits for memory alone: up to 7.

    All but one, each `lanes` rows and columns times depth, fit into `ANYWHERE`: at H = 768 and up
    to 32 rows a program of 8 units has all that it reads under way before its first product.
    """
    return min(7, 1 + ANYWHERE // (lanes * depth * dtype.itemsize))


def step_units(rows: int, hidden: int) -> int:
    """Units a program when every step is a launch: few rows need many programs to share W."""
    if rows <= 64 and 64 < hidden <= 1024:
        return 8
    return 16 if rows <= 64 or hidden <= 64 else 32


def surprisal_config(dtype: torch.dtype) -> TileConfig:
    wide = dtype == torch.float32
    return TileConfig(64 if wide else 128, 128, 32 if wide else 64, 8, 3 if wide else 4)


@dataclass(frozen=True)
class SequenceConfig:
    """A persistent launch over all steps: `ceil(HP / units) * groups` programs.

    Attributes:
        units: U, hidden units a program.
        columns: sequences a group; groups are independent of each other.
        chunk: K elements of one product.
        chunks: of W, a warp where split, else in all.
        split: K is split over warps, W in registers (mma); else every warp sees all of K, W in
            shared memory (wgmma).
    """

    units: int
    columns: int
    warps: int
    chunk: int
    chunks: int
    split: bool

    @property
    def phase(self) -> int:
        """Chunks that are waited for together, then multiplied: a trip to L2.

        They wait in registers, 96 words of a thread; for wgmma, which takes them from shared
        memory, beside W, 48: more spills on sm_100.
        """
        tile, most = self.chunk * self.columns, self.chunks
        if self.split:
            most = 96 * 64 // tile
        else:
            w = 4 * self.units * self.chunk * self.chunks
            most = min(48 * 64 * self.warps // tile, (SHARED // 2 - w) // tile)
        return max(n for n in range(1, self.chunks + 1) if self.chunks % n == 0 and n <= most)

    @property
    def peek(self) -> bool:
        """Whether the first sequence is waited for before all of them: a step reads over 32 KB.

        As long as one program is late all others read without end what they wait for.
        """
        depth = self.chunk * self.chunks * (self.warps if self.split else 1)
        return depth * self.columns > 1 << 14

    def programs(self, width: int) -> int:
        return -(-width // self.units)

    def groups(self, batch: int) -> int:
        return -(-batch // self.columns)


def padded(hidden: int, units: int) -> int:
    """HP: the width in memory, a multiple of `units` and of 16."""
    block = max(units, 16)
    return -(-hidden // block) * block


def _chunks(width: int, warps: int, most: int) -> tuple[int, int]:
    """K elements of a chunk and chunks a warp, so that chunk * chunks * warps >= width."""
    slices = -(-width // (16 * warps))
    if slices > 4:
        slices = -(-slices // 4) * 4
    chunk = 16
    while slices % 2 == 0 and chunk < most:
        slices, chunk = slices // 2, chunk * 2
    return chunk, slices


def sequence_candidates(hidden: int, batch: int, dtype: torch.dtype) -> list[SequenceConfig]:
    """Persistent forward configurations that were compiled, best first (an estimate)."""
    found: list[SequenceConfig] = []
    columns = 8 if batch <= 8 else 16 if batch <= 16 else 32
    if dtype == torch.float32:
        if hidden <= 512 and columns <= 16:
            chunk, n = _chunks(padded(hidden, 8), 8, 64)
            found.append(SequenceConfig(8, columns, 8, chunk, n, True))
        return found
    if hidden <= 1024:
        warps = 4 if columns == 8 or (hidden <= 768 and columns == 16) else 8
        chunk, n = _chunks(padded(hidden, 8), warps, 128)
        if batch <= 32:
            found.append(SequenceConfig(8, columns, warps, chunk, n, True))
        found.append(SequenceConfig(16, 32, 4, 128, -(-padded(hidden, 16) // 128), False))
        if hidden <= 768:
            found.append(SequenceConfig(32, 64, 8, 128, -(-padded(hidden, 32) // 128), False))
    return found


def sequence_backward_candidates(hidden: int, dtype: torch.dtype) -> list[SequenceConfig]:
    """As `sequence_candidates`: K = 4 HP over 8 warps; the more units, the less is read in all."""
    if dtype == torch.float32 or hidden > 1024:
        return []
    found = []
    for units, columns in ((8, 16), (16, 16), (16, 32)):
        chunk, n = _chunks(4 * padded(hidden, units), 8, 128 if columns == 16 else 64)
        found.append(SequenceConfig(units, columns, 8, chunk, n, True))
    return found


def _first(
    chip: Chip, hidden: int, batch: int, units: int, candidates: list[SequenceConfig]
) -> SequenceConfig | None:
    """The first of these with so many units that fits on the chip as a whole."""
    if not chip.cooperative or (chip.capability == 80 and hidden > 768):
        return None
    for config in candidates:
        programs = config.programs(padded(hidden, config.units)) * config.groups(batch)
        known = config.split or chip.capability in (0, 90, 100)
        if config.units == units and programs <= chip.sms and known:
            return config
    return None


def sequence_config(
    chip: Chip, hidden: int, batch: int, dtype: torch.dtype, units: int
) -> SequenceConfig | None:
    """The persistent forward launch, or None: then every step is a launch of its own."""
    return _first(chip, hidden, batch, units, sequence_candidates(hidden, batch, dtype))


def sequence_backward_config(
    chip: Chip, hidden: int, batch: int, dtype: torch.dtype, units: int
) -> SequenceConfig | None:
    """The persistent backward launch: W transposed on the chip."""
    return _first(chip, hidden, batch, units, sequence_backward_candidates(hidden, dtype))


@dataclass(frozen=True)
class RowsPlan:
    """How the rows of one layer run: U, and whether all steps are one launch."""

    units: int
    persistent: bool


def rows_plan(
    chip: Chip, hidden: int, batch: int, rows: int, dtype: torch.dtype, steps: int, training: bool
) -> RowsPlan:
    """The plan for a layer of `rows` prefix rows a sentence (1: a plain sequence)."""
    for units in (8, 16, 32) if rows == 1 and steps > 1 else ():
        shape = chip, hidden, batch, dtype, units
        if sequence_config(*shape) and (not training or sequence_backward_config(*shape)):
            return RowsPlan(units, True)
    return RowsPlan(step_units(batch * rows, hidden), False)
