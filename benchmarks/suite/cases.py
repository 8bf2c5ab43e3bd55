"""What is measured, as data: operation x shape x dtype x backend.

Notation: B sequences, T tokens, D embedding width, H hidden width, E width of the prefix
embeddings, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fusion_model.kernels import BACKENDS as OURS

from fusion_model.errors import FusionLMError

EAGER = "eager"  # what every other backend of a group is compared with

OPERATIONS = {
    "step": "one LSTM step",
    "sequence": "LSTM over whole sequences",
    "training": "training step: forward, backward, Adam",
    "prefixes": "all prefixes of a sentence, each from its own state (early fusion)",
    "head": "log-probability of given tokens",
    "embedding": "prefix embeddings, from text",
    "scoring": "surprisal of a text, whole model",
    "generation": "text, one token at a time, whole model",
}
ON_TEXT = ("embedding", "scoring", "generation")  # a saved model on real text, not a shape
UNITS = {"embedding": "prefixes", "prefixes": "prefixes"}  # the others count tokens

BACKENDS: dict[str, tuple[str, ...]] = {
    "step": (*OURS, EAGER, "cuda-graph", "compile", "onnx", "flashrnn"),
    "sequence": (*OURS, EAGER, "cuda-graph", "compile", "onnx", "flashrnn"),
    "training": (*OURS, EAGER, "published"),
    "prefixes": (*OURS, EAGER, "cuda-graph"),
    "head": ("fusion-lm", EAGER, "compile"),
    "embedding": ("fusion-lm", EAGER, "sentence-transformers"),
    "scoring": (*OURS, EAGER, "onnx", "onnx-int8", "published"),
    "generation": (*OURS, EAGER, "onnx", "onnx-int8", "published"),
}
MEANING = {
    "auto": "fusion-lm, backend auto",
    "torch": "fusion-lm on PyTorch's LSTM",
    "reference": "fusion-lm, plain equations",
    "cudnn": "fusion-lm on cuDNN",
    "triton": "fusion-lm, Triton kernels",
    "fusion-lm": "fusion-lm",
    EAGER: "plain PyTorch: nn.LSTM (cuDNN on a GPU), nothing batched that users do not batch",
    "cuda-graph": "nn.LSTM under a CUDA graph",
    "compile": "torch.compile of the equations, a step at a time",
    "onnx": "ONNX Runtime, float32",
    "onnx-int8": "ONNX Runtime, int8 weights",
    "published": "the published code's way: every prefix from its start",
    "sentence-transformers": "sentence-transformers, batch 32",
    "flashrnn": "FlashRNN",
}


@dataclass(frozen=True)
class Case:
    """One measurement; cases that differ only in `backend` are compared with each other."""

    operation: str
    backend: str
    dtype: str = "float32"
    batch: int = 1
    length: int = 1
    hidden_size: int = 768
    embedding_size: int = 512
    vocab_size: int = 8192
    prefix_size: int = 768

    @property
    def group(self) -> str:
        """What is compared, without the backend."""
        if self.operation in ON_TEXT:
            return f"{self.operation} {self.dtype}"
        head = f" V{self.vocab_size}" if self.operation in ("head", "training") else ""
        size = f"B{self.batch} T{self.length} H{self.hidden_size}{head}"
        return f"{self.operation} {size} {self.dtype}"

    def __str__(self) -> str:
        return f"{self.group} {self.backend}".replace(" ", "-")

    def facts(self) -> dict[str, Any]:
        """For a record of results."""
        return asdict(self) | {"group": self.group, "unit": UNITS.get(self.operation, "tokens")}


Shape = dict[str, Any]

# Each shape is one group; where all but one number agree, the report draws a curve. The first
# shape of an operation stands for it in the overview.
QUICK: dict[str, Sequence[Shape]] = {
    "step": [
        *({"batch": b} for b in (1, 4, 16, 64)),
        *({"hidden_size": h} for h in (256, 512, 1536)),
        {"dtype": "bfloat16"},
    ],
    "sequence": [
        *({"batch": 16, "length": t} for t in (64, 16, 256)),
        *({"batch": b, "length": 64} for b in (1, 4)),
        *({"batch": 16, "length": 64, "hidden_size": h} for h in (256, 512)),
        {"batch": 16, "length": 64, "dtype": "bfloat16"},
    ],
    "training": [{"batch": 8, "length": 32, "dtype": d} for d in ("float32", "bfloat16")],
    "prefixes": [{"batch": 4, "length": t} for t in (32, 8, 16)],
    "head": [{"batch": 16, "length": 64, "dtype": d} for d in ("float32", "bfloat16")],
    "embedding": [{}],
    "scoring": [{}],
    "generation": [{}],
}
FULL: dict[str, Sequence[Shape]] = QUICK | {
    "step": [
        *({"batch": b} for b in (1, 2, 4, 8, 16, 32, 64, 128, 256)),
        *({"hidden_size": h} for h in (128, 256, 384, 512, 1024, 1536, 2048)),
        *({"batch": b, "dtype": "bfloat16"} for b in (1, 16, 64)),
    ],
    "sequence": [
        *({"batch": 16, "length": t} for t in (64, 8, 16, 32, 128, 256, 512)),
        *({"batch": b, "length": 64} for b in (1, 2, 4, 8, 32, 64)),
        *({"batch": 16, "length": 64, "hidden_size": h} for h in (128, 256, 384, 512, 1024, 1536)),
        *({"batch": b, "length": 64, "dtype": "bfloat16"} for b in (1, 16, 64)),
    ],
    "prefixes": [
        *({"batch": 4, "length": t} for t in (32, 8, 16, 64)),
        *({"batch": b, "length": 32} for b in (1, 16)),
        {"batch": 4, "length": 32, "dtype": "bfloat16"},
    ],
    "embedding": [{"dtype": d} for d in ("float32", "bfloat16")],
}
_SMALL = {"hidden_size": 32, "embedding_size": 16, "vocab_size": 300, "prefix_size": 32}
TINY: dict[str, Sequence[Shape]] = {
    name: [{}] if name in ON_TEXT else [_SMALL | {"batch": 2, "length": 1 + 4 * (name != "step")}]
    for name in OPERATIONS
}
SUITES = {"tiny": TINY, "quick": QUICK, "full": FULL}


def cases(suite: str, only: Sequence[str] = ()) -> list[Case]:
    """All cases of a suite, group by group.

    Args:
        suite: one of `SUITES`.
        only: names of operations or of backends (default: all); a backend is always measured
            beside the eager one.

    Raises:
        FusionLMError: neither an operation nor a backend.
    """
    operations, backends = _chosen(only)
    return [
        Case(operation, backend, **shape)
        for operation in operations
        for shape in SUITES[suite][operation]
        for backend in _backends(operation, backends)
    ]


def own_cases(shape: Shape, only: Sequence[str] = (), sweep: bool = False) -> list[Case]:
    """The operations on shapes, at the user's own one; `sweep` adds its neighbours for curves."""
    operations, backends = _chosen(only)
    found: dict[Case, None] = {}
    for operation in operations:
        if operation in ON_TEXT:
            continue
        base = Case(operation, EAGER, **shape)
        base = replace(base, length=1) if operation == "step" else base
        neighbours = [base]
        if sweep:
            neighbours += [replace(base, batch=base.batch * k) for k in (2, 4)]
            neighbours += [replace(base, hidden_size=max(8, base.hidden_size // 2))]
        for case in neighbours:
            for backend in _backends(operation, backends):
                found[replace(case, backend=backend)] = None
    if not found:
        raise FusionLMError(f"--only {', '.join(only)} is measured on text and has no shape")
    return list(found)


def _chosen(only: Sequence[str]) -> tuple[list[str], set[str]]:
    known = {name for names in BACKENDS.values() for name in names}
    for name in only:
        if name not in OPERATIONS and name not in known:
            raise FusionLMError(
                f"unknown {name!r}: choose operations ({', '.join(OPERATIONS)}) or backends "
                f"({', '.join(sorted(known))})"
            )
    operations = [name for name in OPERATIONS if name in only]
    backends = {name for name in only if name in known}
    return operations or list(OPERATIONS), backends


def _backends(operation: str, chosen: set[str]) -> Iterator[str]:
    mine = BACKENDS[operation]
    if chosen and not chosen & set(mine):
        return  # an operation that this backend does not know
    for name in mine:
        if not chosen or name in chosen or name == EAGER:
            yield name
