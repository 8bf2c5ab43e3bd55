"""How a text's vectors become one: the names of poolings, parsed."""

from typing import NamedTuple

from fusion_model.errors import EncoderError

POOLINGS = ("cls", "mean", "pooler", "last", "sep", "mask", "static")
LAST = -1


class Pooling(NamedTuple):
    """One vector of a text: `name` of `POOLINGS`, of the encoder's last layer, -1, or another."""

    name: str
    layer: int = LAST


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
                "the encoder's N-th layer, or join some: static+mean"
            )
        parts.append(Pooling(name, int(layer) if layered else LAST))
    return tuple(parts)
