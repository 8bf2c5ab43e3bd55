"""What a JSON file of ours says, as a type, and numbers within their range. Needs no PyTorch.

A file is written with a checksum of what it says, so that none is read that was changed since.
"""

import hashlib
import json
import math
from dataclasses import is_dataclass
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from fusion_model.errors import FusionLMError
from fusion_model.files import write_text

SEAL = "checksum"


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included but where `ends` has a round bracket."""

    low: float
    high: float = math.inf
    ends: Literal["[]", "(]", "[)", "()"] = "[]"

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, (int, float))
        left = value > self.low if self.ends[0] == "(" else value >= self.low
        return left and (value < self.high if self.ends[1] == ")" else value <= self.high)

    def __str__(self) -> str:
        if self.ends == "[]" and self.high < math.inf and self.low != 1:
            return f"from {self.low:,} to {self.high:,}"
        low = f"{'above' if self.ends[0] == '(' else 'at least'} {self.low:,}"
        if self.high == math.inf:
            return low + (" and finite" if self.ends[1] == ")" else "")
        return f"{low} and {'below' if self.ends[1] == ')' else 'at most'} {self.high:,}"


Count = Annotated[int, Range(0)]
Size = Annotated[int, Range(1, 2**31 - 1)]
Layers = Annotated[int, Range(1, 64)]
Share = Annotated[float, Range(0, 1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


def check(value: Any, kind: Any, name: str) -> None:
    """Hold a value to a type: a class, `Any`, `Literal`, a type or None, a list, tuple or dict of
    such, a `TypedDict` or the fields of a dataclass (and maybe more), a number with a `Range`.

    Raises:
        ValueError: it is not; the message names the place, of which `name` is the beginning.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if origin is NotRequired:
        check(value, parts[0], name)
    elif origin is Annotated:
        check(value, parts[0], name)
        if value not in parts[1]:
            raise ValueError(f"{name} must be {parts[1]}, not {value}")
    elif origin in (Union, UnionType):
        if value is None and type(None) in parts:
            return
        check(value, next(p for p in parts if p is not type(None)), name)
    elif origin is Literal:
        if value not in parts:
            raise ValueError(f"{name} must be one of {', '.join(map(str, parts))}, not {value!r}")
    elif origin is tuple and parts[-1] is not ...:
        check(value, list, name)
        if len(value) != len(parts):
            raise ValueError(f"{name} must have {len(parts)} entries, not {len(value)}")
        for i, (entry, part) in enumerate(zip(value, parts, strict=True)):
            check(entry, part, f"{name}[{i}]")
    elif origin in (list, tuple):
        check(value, origin, name)
        for i, entry in enumerate(value):
            check(entry, parts[0], f"{name}[{i}]")
    elif origin is dict:
        check(value, dict, name)
        for key, entry in value.items():
            check(entry, parts[1], f"{name}.{key}")
    elif is_typeddict(kind) or is_dataclass(kind):
        check(value, dict, name)
        required = getattr(kind, "__required_keys__", kind.__annotations__)
        for key, part in get_type_hints(kind, include_extras=True).items():
            if key in value:
                check(value[key], part, f"{name}.{key}")
            elif key in required:
                raise ValueError(f"{name} lacks {key!r}")
    else:
        numbers = {float: (float, int), int: (int,)}.get(kind, (kind,))
        if not isinstance(value, numbers) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} must be of type {kind.__name__}, not {str(value)[:40]!r}")


def read_json(path: Path, kind: Any, sealed: bool = False) -> Any:
    """What a file says, held to its type.

    Args:
        sealed: refuse a file without a checksum, as earlier versions wrote some.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, says something else, or was changed since it was written.
    """
    value = _parse(path.read_text(encoding="utf-8"))
    if isinstance(value, dict) and (sealed or SEAL in value):
        if SEAL not in value:
            raise ValueError("it has no checksum")
        if value.pop(SEAL) != sha256_of(value):
            raise ValueError("its checksum differs: it was changed since it was written")
    check(value, kind, path.stem)
    return value


def read_lines(path: Path, kind: Any) -> list[Any]:
    """What a file says, one in JSON a line, each held to a type; nothing where there is no file.

    Raises:
        FusionLMError: it is damaged.
    """
    if not path.exists():
        return []
    try:
        lines = [_parse(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for number, line in enumerate(lines, start=1):
            check(line, kind, f"line {number}")
    except (OSError, ValueError) as error:
        raise FusionLMError(f"{path} is damaged ({error}): delete it") from None
    return lines


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_json(path: Path, contents: dict[str, Any], indent: int | None = 1) -> None:
    """Replace a file in one step, sealed with its checksum."""
    sealed = contents | {SEAL: sha256_of(json.loads(json.dumps(contents)))}
    write_text(path, json.dumps(sealed, indent=indent, ensure_ascii=False) + "\n")


def sha256_of(contents: Any) -> str:
    """Hash of what can be written as JSON."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()
