"""How a text's vectors become one: the names of poolings, parsed."""

from collections.abc import Sequence
from typing import NamedTuple

from fusion_model.errors import EncoderError

POOLINGS = ("cls", "mean", "pooler", "last", "sep", "mask", "static")
LAST = -1


class Pooling(NamedTuple):
    """One vector of a text: `name` of `POOLINGS`, of the encoder's last layer, -1, or another."""

    name: str
    layer: int = LAST


def read_of(poolings: Sequence[Pooling], depth: int) -> list[Pooling]:
    """Those that the layers are run for, all but `static`, each with its layer's number.

    Args:
        depth: the encoder's layers.
    """
    return [
        p._replace(layer=depth if p.layer == LAST else p.layer)
        for p in poolings
        if p.name != "static"
    ]


def parse_pooling(pooling: str) -> tuple[Pooling, ...]:
    """`static+mean@3` -> (Pooling("static"), Pooling("mean", 3)).

    Raises:
        EncoderError: a pooling that does not exist.
    """
    parts = []
    for part in pooling.split("+"):
        name, at, layer = part.partition("@")
        layered = at and layer.isdecimal() and name not in ("static", "pooler")
        if name not in POOLINGS or bool(at) != bool(layered):
            raise EncoderError(
                f"unknown pooling {part!r}: choose from {', '.join(POOLINGS)}, with @N those of "
                "the encoder's N-th layer, or join some: static+mean; or take auto by itself"
            )
        parts.append(Pooling(name, int(layer) if layered else LAST))
    return tuple(parts)
