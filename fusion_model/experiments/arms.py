"""Which arms each training experiment compares."""

import dataclasses
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from fusion_model.config import FUSIONS, FusionLMConfig
from fusion_model.encoders.controls import BAGS
from fusion_model.errors import FusionLMError
from fusion_model.experiments.sizes import Size
from fusion_model.model import FusionLMForCausalLM


@dataclass(frozen=True)
class Arm:
    """One way to build and train a model.

    Attributes:
        options: fields of `TrainingOptions` that set it apart.
        model: one of `baselines.MODELS`, or of `NGRAMS`.
        like: the arm whose settings it takes, where a smaller text tuned them; none: its own.
        most: not trained on more sentences than so many; 0: on all.
        misled: tested with the embeddings of other positions, though trained with its own.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "plain"
    like: Optional["Arm"] = None
    most: int = 0
    misled: bool = False


NGRAMS = {"unigram": 1, "trigram": 3}
COUNTED = [
    Arm("unigram", {"fusion": "none"}, "unigram"),
    Arm("Kneser-Ney trigram", {"fusion": "none"}, "trigram"),
]
POOLINGS = ("cls", "mean", "pooler", "last", "sep", "mask", "static+mean", "static+last")
VIEWS = ("prefix", "sentence", "left:0.5", "right:0.5", "previous", "masked")
POLICIES = ("every", "word", "stride:4", "sentence", "incremental", "incremental+refresh:8")
PREFIX_RMS = 0.05
"""Of each pooling in fused arms: that of token embeddings at the start, and nearly that of MiniLM's
`static`, which comes as it is."""
UNFUSED, STATIC, FUSED = "unfused", "static", "fused"


def fitted(arm: Arm, size: Size, width: int, wanted: int) -> Arm:
    """The arm with the narrowest LSTM that gives it so many parameters: a multiple of four, as
    with other widths oneDNN's bfloat16 LSTM takes twice as long.

    Args:
        width: of its e.
    """

    def parameters(hidden: int) -> int:
        return count_parameters({**size.training, **arm.options, "hidden_size": hidden}, width)

    widths = range(4, 16 * int(size.training["hidden_size"]), 4)
    hidden = widths[bisect_left(widths, wanted, key=parameters)]
    return dataclasses.replace(arm, options={**arm.options, "hidden_size": hidden})


def count_parameters(fields: Mapping[str, Any], width: int) -> int:
    """Of the model that these fields of `TrainingOptions` describe."""
    import torch

    names = ("vocab_size", "embedding_size", "hidden_size", "fusion", "tie_weights")
    shape = {name: fields[name] for name in names if name in fields}
    with torch.device("meta"):
        model = FusionLMForCausalLM(FusionLMConfig(**shape, prefix_size=width))
    return sum(p.numel() for p in model.parameters())


def joined_pooling(layers: int) -> str:
    """What the experiments fuse that compare something else than poolings: the static vector of
    the last token, and its state and the mean of all states in the encoder's middle layer."""
    middle = max(layers // 2, 1)
    return f"static+last@{middle}+mean@{middle}"


def arms_of(experiment: str, size: Size, encoder_width: int, layers: int) -> list[Arm]:
    """The arms of an experiment: two that count, then baselines with the parameters of `concat`,
    the unfused one first.

    Args:
        encoder_width: of one pooling; the joined one has three times that.
        layers: of the encoder.

    Raises:
        FusionLMError: an unknown experiment.
    """
    one, joined = encoder_width, 3 * encoder_width
    options = {
        "fusion": "concat",
        "pooling": joined_pooling(layers),
        "policy": "incremental",
        "prefix_rms": PREFIX_RMS,
    }
    concat = Arm(FUSED, options)
    wanted = count_parameters({**size.training, **options}, joined)

    def fused(name: str, model: str = "plain", like: Arm | None = concat, **own: Any) -> Arm:
        return Arm(name, {**options, **own}, model, like)

    unfused = fitted(Arm(UNFUSED, {"fusion": "none"}), size, one, wanted)
    awd = {"fusion": "none", "tie_weights": True}
    strong = fitted(Arm("unfused, AWD", awd, "awd"), size, one, wanted)
    static = fitted(Arm(STATIC, {"fusion": "concat", "pooling": "static"}), size, one, wanted)
    usual = [*COUNTED, unfused, strong, static]
    if experiment in ("data-size", "domain", "reading-times", "examples"):
        at_input = Arm("static at the input", {"fusion": "input", "pooling": "static"})
        exact = Arm("exact mean", {"fusion": "concat", "pooling": "mean"}, most=size.sentences)
        usual = [*COUNTED, unfused, static, concat, strong, fitted(at_input, size, one, wanted)]
        usual.append(fitted(exact, size, one, wanted))
        if experiment == "data-size":
            raw = {**options, "prefix_rms": 0.0}
            usual.append(Arm("fused, e as it comes", raw, most=size.sentences))
        return usual
    if experiment == "fusion":
        return [*usual, *(fused(mode, fusion=mode) for mode in FUSIONS if mode != "none")]
    if experiment == "encoder":
        names = (*POOLINGS, str(options["pooling"]))
        poolings = [fused(p, like=None, pooling=p, policy="every") for p in names]
        bags = [fused(f"{n} (bag)", like=None, encoder=n, policy="every") for n in (*BAGS, "zeros")]
        return [*usual, *poolings, *bags, fused("embedding only (MLP)", "mlp", None)]
    if experiment == "view":
        # Pooled alike: a static vector of the view's own end would be of another token.
        views = [fused(v, like=None, view=v, policy="every", pooling="mean") for v in VIEWS]
        shuffled = [fused(f"shuffled, {s}", shuffle=s) for s in ("sentence", "corpus")]
        misled = dataclasses.replace(concat, name="fused, tested with shuffled e", misled=True)
        return [*usual, *views, concat, *shuffled, misled]
    if experiment == "schedule":
        schedules = ("constant", "rising", "falling")
        arms = [fused(f"{s} dropout", prefix_dropout_schedule=s) for s in schedules]
        published: dict[str, Any] = {"prefix_dropout_schedule": "rising", "patience": 0}
        return [*usual, *arms, fused("rising, in evaluation too", "dropping", **published)]
    if experiment == "policy":
        arms = [fused(policy, policy=policy) for policy in POLICIES]
        arms += [
            fused(f"{policy}, {other}", policy=policy, pooling=other)
            for policy in ("every", "incremental")
            for other in ("static+mean", "static+last")
        ]
        return [*usual, *arms]
    raise FusionLMError(f"unknown experiment {experiment!r}")
