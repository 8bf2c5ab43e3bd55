"""How large an experiment is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusion_model.errors import FusionLMError


@dataclass(frozen=True)
class Size:
    """What all arms of an experiment share.

    Attributes:
        sentences, dev, test: sentences to train on, to choose by, and most of each test text.
        training: fields of `TrainingOptions`.
        learning_rates, dropouts, prefix_dropouts: grids that each arm alike climbs on dev, see
            `tuning.search`; the last is of dropout on e.
        data_sizes: epochs by number of sentences, of each step of the experiment `data-size`.
        tuned_at: sentences at which the grids are searched; at other sizes, dev chooses among what
            it chose there, with every dropout on e. 0: they are searched at each size.
        mixed: trained on Brown and prose together, see `corpora.write_texts`.
    """

    name: str
    sentences: int
    dev: int
    test: int
    training: dict[str, Any] = field(default_factory=dict)
    learning_rates: tuple[float, ...] = (0.002,)
    dropouts: tuple[float, ...] = (0.2,)
    prefix_dropouts: tuple[float, ...] = (0.5,)
    data_sizes: Mapping[int, int] = field(default_factory=dict)
    tuned_at: int = 0
    mixed: bool = False

    @property
    def grids(self) -> dict[str, tuple[float, ...]]:
        """Values by field of `TrainingOptions`, ascending; the search begins in the middle."""
        return {
            "learning_rate": self.learning_rates,
            "prefix_dropout": self.prefix_dropouts,
            "dropout": self.dropouts,
        }


FAST = {"precision": "auto", "encoder_dtype": "auto"}
SIZES = {
    "small": Size(
        "small",
        sentences=1500,
        dev=400,
        test=800,
        training={
            "vocab_size": 4096,
            "embedding_size": 128,
            "hidden_size": 128,
            "max_tokens": 32,
            "epochs": 8,
            "patience": 2,
            "tokens_per_batch": 1024,
            **FAST,
        },
        learning_rates=(0.0006, 0.00125, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
        dropouts=(0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9),
        prefix_dropouts=(0.3, 0.5, 0.7, 0.85, 0.95),
        data_sizes={375: 32, 750: 16, 1500: 8},
    ),
    "medium": Size(
        "medium",
        sentences=20_000,
        dev=3000,
        test=6000,
        training={
            "vocab_size": 8192,
            "embedding_size": 256,
            "hidden_size": 512,
            "tie_weights": True,
            "max_tokens": 64,
            "epochs": 10,
            "patience": 3,
            "tokens_per_batch": 2048,
            **FAST,
        },
        learning_rates=(0.002, 0.005),
        dropouts=(0.3, 0.5),
        prefix_dropouts=(0.5, 0.8),
        data_sizes={5000: 16, 20_000: 10, 80_000: 6},
        tuned_at=5000,
        mixed=True,
    ),
    "paper": Size(
        "paper",
        sentences=100_000,
        dev=10_000,
        test=10_000,
        training={
            "vocab_size": 8192,
            "embedding_size": 512,
            "hidden_size": 768,
            "max_tokens": 128,
            "epochs": 20,
            "patience": 3,
            "tokens_per_batch": 4096,
            **FAST,
        },
        learning_rates=(0.0001, 0.0003, 0.001, 0.003, 0.01),
        dropouts=(0.1, 0.2, 0.4, 0.6, 0.8),
        prefix_dropouts=(0.1, 0.3, 0.5, 0.7, 0.85),
        data_sizes={5_000: 400, 10_000: 200, 25_000: 80, 50_000: 40, 100_000: 20},
    ),
}


def size_by_name(name: str) -> Size:
    """One of `SIZES`.

    Raises:
        FusionLMError: an unknown name.
    """
    if name not in SIZES:
        raise FusionLMError(f"unknown size {name!r}: choose one of {', '.join(SIZES)}")
    return SIZES[name]
