"""Which arms each training experiment compares."""

from collections.abc import Mapping
from typing import Any

from fusion_model.config import FUSIONS, FusionLMConfig
from fusion_model.errors import FusionLMError
from fusion_model.experiments.sizes import Size
from fusion_model.experiments.study import Arm
from fusion_model.model import FusionLMForCausalLM

POOLINGS = ("cls", "mean", "pooler", "last", "sep", "mask", "static", "static+mean", "static+last")
VIEWS = ("prefix", "sentence", "left:0.5", "right:0.5", "masked", "previous")
POLICIES = ("every", "word", "stride:4", "sentence", "incremental", "incremental+refresh:8")
FUSED = "static+mean"
STATIC = Arm("static control", {"fusion": "concat", "pooling": "static"})
STRONG = Arm("unfused, AWD", {"fusion": "none", "tie_weights": True}, model="awd")
STRONG_FUSED = Arm(
    "concat, AWD", {"fusion": "concat", "pooling": FUSED, "tie_weights": True}, model="awd"
)
WIDER = "unfused, wider"


def baseline(size: Size, encoder_width: int) -> Arm:
    """Unfused, its LSTM widened until it has the parameters of `concat` with this encoder."""
    fields: Mapping[str, Any] = size.training
    wanted = _parameters(fields, "concat", encoder_width, fields["hidden_size"])
    hidden = fields["hidden_size"]
    while _parameters(fields, "none", 1, hidden) < wanted:
        hidden += 1
    return Arm(WIDER, {"fusion": "none", "hidden_size": hidden})


def _parameters(fields: Mapping[str, Any], fusion: str, width: int, hidden: int) -> int:
    import torch

    config = FusionLMConfig(
        vocab_size=fields["vocab_size"],
        embedding_size=fields["embedding_size"],
        hidden_size=hidden,
        fusion=fusion,
        prefix_size=width,
    )
    with torch.device("meta"):
        return sum(p.numel() for p in FusionLMForCausalLM(config).parameters())


def fused(name: str, **options: Any) -> Arm:
    """Late concat of static + mean, but for `options`."""
    return Arm(name, {"fusion": "concat", "pooling": FUSED, **options})


def arms_of(experiment: str, size: Size, encoder_width: int, layers: int) -> list[Arm]:
    """The arms of an experiment; the first is what the others are compared with.

    Args:
        encoder_width: of one pooling; `static+mean` has twice that.
        layers: of the encoder.

    Raises:
        FusionLMError: an unknown experiment.
    """
    wider = baseline(size, 2 * encoder_width)
    plain = Arm("unfused", {"fusion": "none"})
    concat = fused("static+mean")
    if experiment == "fusion":
        modes = [fused(mode, fusion=mode) for mode in FUSIONS if mode != "none"]
        return [wider, plain, STATIC, *modes, STRONG, STRONG_FUSED]
    if experiment in ("data-size", "domain", "reading-times", "examples"):
        return [wider, STRONG, STATIC, concat]
    if experiment == "encoder":
        poolings = [fused(p, pooling=p) for p in POOLINGS if p != "static"]
        others = [
            fused(f"{name} (bag)" if name != "zeros" else name, encoder=name)
            for name in ("tfidf", "counts", "zeros")
        ]
        only = Arm("embedding only (MLP)", {"fusion": "concat", "pooling": FUSED}, model="mlp")
        return [wider, STRONG, STATIC, *poolings, *others, only]
    if experiment == "view":
        views = [fused(view, view=view) for view in VIEWS]
        shuffled = [fused(f"shuffled, {s}", shuffle=s) for s in ("sentence", "corpus")]
        return [wider, STRONG, STATIC, *views, *shuffled]
    if experiment == "schedule":
        names = ("constant", "rising", "falling")
        return [
            wider,
            STRONG,
            STATIC,
            *(fused(f"{s} dropout", prefix_dropout_schedule=s) for s in names),
        ]
    if experiment == "policy":
        middle = max(layers // 2, 1)
        arms = [fused(policy, policy=policy) for policy in POLICIES]
        arms += [
            fused(f"{policy}, {pooling}", policy=policy, pooling=pooling)
            for policy in ("every", "incremental")
            for pooling in ("static+last", f"static+last@{middle}+mean@{middle}")
        ]
        return [wider, STRONG, STATIC, *arms]
    raise FusionLMError(f"unknown experiment {experiment!r}")
