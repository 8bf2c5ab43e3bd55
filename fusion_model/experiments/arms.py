"""Which arms each training experiment compares."""

from collections.abc import Mapping
from typing import Any

from fusion_model.config import FUSIONS, FusionLMConfig
from fusion_model.errors import FusionLMError
from fusion_model.experiments.sizes import Size
from fusion_model.experiments.study import Arm
from fusion_model.model import FusionLMForCausalLM
from fusion_model.prefixes.views import CAUSAL_VIEWS

POOLINGS = ("cls", "mean", "pooler", "last", "sep", "mask", "static+mean", "static+last")
VIEWS = ("prefix", "sentence", "left:0.5", "right:0.5", "masked", "previous")
POLICIES = ("every", "word", "stride:4", "sentence", "incremental", "incremental+refresh:8")
STATIC = Arm("static control", {"fusion": "concat", "pooling": "static"})
WIDER = "unfused, wider"


def widened(name: str, arm: Mapping[str, Any], model: str, size: Size, width: int) -> Arm:
    """An arm whose LSTM is widened until it has the parameters of `concat`.

    Args:
        arm: its options.
        width: of e, for it and for `concat`.
    """
    fields = dict(size.training)
    wanted = _parameters({**fields, "fusion": "concat"}, width)
    while _parameters({**fields, **arm}, width) < wanted:
        fields["hidden_size"] += 1
    return Arm(name, {**arm, "hidden_size": fields["hidden_size"]}, model)


def _parameters(fields: Mapping[str, Any], width: int) -> int:
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
    """The arms of an experiment; the first is what the others are compared with.

    Args:
        encoder_width: of one pooling; the joined one has three times that.
        layers: of the encoder.

    Raises:
        FusionLMError: an unknown experiment.
    """
    pooling = joined_pooling(layers)

    def fused(name: str, model: str = "plain", **options: Any) -> Arm:
        return Arm(name, {"fusion": "concat", "pooling": pooling, **options}, model)

    awd = {"pooling": pooling, "tie_weights": True}
    width = 3 * encoder_width
    wider = widened(WIDER, {"fusion": "none"}, "plain", size, width)
    strong = widened("unfused, AWD", {"fusion": "none", "tie_weights": True}, "awd", size, width)
    strong_fused = widened("concat, AWD", {"fusion": "concat", **awd}, "awd", size, width)
    concat = fused("fused")
    usual = [wider, strong, STATIC]
    if experiment == "fusion":
        plain = Arm("unfused", {"fusion": "none"})
        modes = [fused(mode, fusion=mode) for mode in FUSIONS if mode != "none"]
        return [wider, plain, *usual[1:], *modes, strong_fused]
    if experiment in ("data-size", "domain", "reading-times", "examples"):
        return [*usual, concat]
    if experiment == "encoder":
        poolings = [fused(p, pooling=p) for p in (*POOLINGS, pooling)]
        bags = [fused(f"{name} (bag)", encoder=name) for name in ("tfidf", "counts")]
        only = fused("embedding only (MLP)", "mlp")
        return [*usual, *poolings, *bags, fused("zeros", encoder="zeros"), only]
    if experiment == "view":
        views = [
            fused(view if view in CAUSAL_VIEWS else f"{view} (sees the future)", view=view)
            for view in VIEWS
        ]
        shuffled = [fused(f"shuffled, {s}", shuffle=s) for s in ("sentence", "corpus")]
        return [*usual, *views, *shuffled]
    if experiment == "schedule":
        names = ("constant", "rising", "falling")
        return [*usual, *(fused(f"{s} dropout", prefix_dropout_schedule=s) for s in names)]
    if experiment == "policy":
        arms = [fused(policy, policy=policy) for policy in POLICIES]
        arms += [
            fused(f"{policy}, {other}", policy=policy, pooling=other)
            for policy in ("every", "incremental")
            for other in ("static+mean", "static+last")
        ]
        return [*usual, *arms]
    raise FusionLMError(f"unknown experiment {experiment!r}")
