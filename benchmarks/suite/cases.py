"""What is measured, as data: operation x shape x dtype x backend.

Notation: B sequences, T tokens, D embedding width, H hidden width, E width of the prefix
embeddings, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fusion_model.kernels import BACKENDS as OURS

from fusion_model.errors import FusionLMError

EAGER = "eager"  # what every other backend of a group is compared with

OPERATIONS = {
    "step": "one LSTM step",
    "sequence": "LSTM over whole sequences",
    "training": "training step: forward, backward, Adam; embeddings at hand",
    "evaluation": "surprisal of tokens, embeddings at hand",
    "prefixes": "all prefixes of a sentence, each from its own state (early fusion)",
    "head": "log-probability of given tokens",
    "embedding": "prefix embeddings, from text",
    "streaming": "prefix embeddings of one text, token by token",
    "scoring": "surprisal of a text, encoder included",
    "generation": "text, one token at a time, encoder included",
}
ON_TEXT = ("embedding", "streaming", "scoring", "generation")  # real text, not a shape
UNITS = dict.fromkeys(("embedding", "streaming", "prefixes"), "prefixes")  # the others: tokens

# After a slash: a batch size, an encoding policy with the pooling where it is not `mean`, or the
# model's unfused twin.
BACKENDS: dict[str, tuple[str, ...]] = {
    "step": (*OURS, EAGER, "cuda-graph", "compile", "onnx", "flashrnn"),
    "sequence": (*OURS, EAGER, "cuda-graph", "compile", "onnx", "flashrnn"),
    "training": (*OURS, EAGER, "published"),
    "evaluation": (*OURS, EAGER, "published"),
    "prefixes": (*OURS, EAGER, "cuda-graph"),
    "head": ("fusion-lm", EAGER, "compile"),
    "embedding": (
        *(EAGER, *(f"sentence-transformers/{size}" for size in (8, 32, 128))),
        "sentence-transformers-onnx/32",
        *(f"fusion-lm/{policy}" for policy in ("every", "word", "stride:4", "sentence")),
        *("fusion-lm/incremental", "fusion-lm/incremental last@3+mean@3"),
        "fusion-lm/incremental+refresh:16",
    ),
    "streaming": (
        *(EAGER, "fusion-lm/every", "fusion-lm/incremental"),
        "fusion-lm/incremental+refresh:16",
    ),
    "scoring": (*OURS, EAGER, "batched", "onnx", "onnx-int8", "published"),
    "generation": (*OURS, EAGER, "onnx", "onnx-int8", "published"),
}
_POLICIES = tuple(
    f"{way}/{policy}"
    for way in ("auto", "onnx", "onnx-int8")
    for policy in ("every", "incremental", "unfused")
)
IN_FIGURES = {  # what the README's tables show; the other operations as above
    "training": ("auto", EAGER, "published"),
    "evaluation": ("auto", EAGER, "published"),
    "scoring": (EAGER, "batched", "published", *_POLICIES),
    "generation": (EAGER, "published", *_POLICIES),
}
# Of each way: what it is, and its colour in charts.
WAYS = {
    "auto": ("fusion-lm, backend auto", "#1f6feb"),
    "torch": ("fusion-lm on PyTorch's LSTM", "#4fa3d9"),
    "reference": ("fusion-lm, plain equations", "#0f8f83"),
    "cudnn": ("fusion-lm on cuDNN", "#444c8c"),
    "triton": ("fusion-lm, Triton kernels", "#7a4fd0"),
    "fusion-lm": ("fusion-lm", "#1f6feb"),
    EAGER: (
        "plain PyTorch: nn.LSTM (cuDNN on a GPU); a text by one call a prefix and a sentence",
        "#6b737c",
    ),
    "batched": ("plain PyTorch in batches: 32 prefixes, padded; all sentences, padded", "#9aa3ab"),
    "cuda-graph": ("nn.LSTM under a CUDA graph", "#bf3f8a"),
    "compile": ("torch.compile of the equations, a step at a time", "#b87400"),
    "onnx": ("ONNX Runtime, float32", "#3d8b37"),
    "onnx-int8": ("ONNX Runtime, int8 weights", "#7d8f00"),
    "published": ("the published code's way: every prefix from its start", "#c4432f"),
    "sentence-transformers": ("sentence-transformers, texts a batch after the slash", "#8a5a3c"),
    "sentence-transformers-onnx": ("the same with its ONNX backend", "#c08a5a"),
    "flashrnn": ("FlashRNN", "#b59f00"),
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
    def way(self) -> str:
        """The backend without what follows a slash."""
        return self.backend.partition("/")[0]

    @property
    def variant(self) -> str:
        """What follows the slash, or nothing."""
        return self.backend.partition("/")[2]

    @property
    def group(self) -> str:
        """What is compared, without the backend."""
        if self.operation in ON_TEXT:
            tokens = f" T{self.length}" if self.operation == "streaming" else ""
            return f"{self.operation}{tokens} {self.dtype}"
        has_head = self.operation in ("head", "training", "evaluation")
        size = f"B{self.batch} T{self.length} H{self.hidden_size}"
        return f"{self.operation} {size}{f' V{self.vocab_size}' * has_head} {self.dtype}"

    def __str__(self) -> str:
        return f"{self.group} {self.backend}".replace(" ", "-")

    def facts(self) -> dict[str, Any]:
        """For a record of results."""
        return asdict(self) | {"group": self.group, "unit": UNITS.get(self.operation, "tokens")}


Shape = dict[str, Any]
_DTYPES = ("float32", "bfloat16")

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
    "training": [{"batch": 8, "length": 32, "dtype": d} for d in _DTYPES],
    "evaluation": [{"batch": 8, "length": 32, "dtype": d} for d in _DTYPES],
    "prefixes": [{"batch": 4, "length": t} for t in (32, 8, 16)],
    "head": [{"batch": 16, "length": 64, "dtype": d} for d in _DTYPES],
    "embedding": [{}],
    "streaming": [{"length": 64}],
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
    "embedding": [{"dtype": d} for d in _DTYPES],
    "streaming": [{"length": t} for t in (64, 16, 256)],
}
_SMALL = {"hidden_size": 32, "embedding_size": 16, "vocab_size": 300, "prefix_size": 32}
TINY: dict[str, Sequence[Shape]] = {
    name: [{}] if name in ON_TEXT else [_SMALL | {"batch": 2, "length": 1 + 4 * (name != "step")}]
    for name in OPERATIONS
}
# One float32 shape each; embeddings in bfloat16, too, and streams as they grow.
FIGURES = {name: shapes[:1] for name, shapes in QUICK.items()} | {
    name: FULL[name] for name in ("embedding", "streaming")
}
SUITES = {"tiny": TINY, "quick": QUICK, "full": FULL, "figures": FIGURES}


def cases(suite: str, only: Sequence[str] = ()) -> list[Case]:
    """All cases of a suite, group by group.

    Args:
        suite: one of `SUITES`.
        only: names of operations or of backends (default: all); a backend is always measured
            beside the eager one.

    Raises:
        FusionLMError: neither an operation nor a backend; backends of other operations only.
    """
    known = {Case("", name).way for names in BACKENDS.values() for name in names}
    for name in only:
        if name not in OPERATIONS and name.partition("/")[0] not in known:
            raise FusionLMError(
                f"unknown {name!r}: choose operations ({', '.join(OPERATIONS)}) or backends "
                f"({', '.join(sorted(known))})"
            )
    operations = [name for name in OPERATIONS if name in only] or list(OPERATIONS)
    wanted = {name for name in only if name not in OPERATIONS}
    found = []
    for operation in operations:
        own = BACKENDS[operation]
        if suite == "figures":
            own = IN_FIGURES.get(operation, own)
        names = [n for n in own if not wanted or {n, Case("", n).way} & wanted]
        if names and EAGER not in names:
            names.append(EAGER)
        found += [
            Case(operation, name, **shape) for shape in SUITES[suite][operation] for name in names
        ]
    if not found:
        homes = [
            o for o in OPERATIONS if {w for n in BACKENDS[o] for w in (n, Case("", n).way)} & wanted
        ]
        raise FusionLMError(
            f"{', '.join(operations)}: not measured with {', '.join(sorted(wanted))}, but "
            f"{', '.join(homes)} can be"
        )
    return found


def own_cases(shape: Shape, only: Sequence[str] = ()) -> list[Case]:
    """The operations on shapes, at the user's own one; none if all that is asked for is on text.

    Raises:
        FusionLMError: as `cases`.
    """
    return [
        Case(c.operation, c.backend, **(shape | ({"length": 1} if c.operation == "step" else {})))
        for c in cases("tiny", only)
        if c.operation not in ON_TEXT
    ]
