"""Stage 3: what the encoder is shown at each position of a sentence.

A sentence of n tokens (BOS and EOS not counted) has n + 1 positions: after t = 0..n tokens the
model predicts token t + 1, at t = n EOS. Views as in the published code of arXiv 2208.02402, whose
crops are of the prefix. All but `prefix` and `previous` see the future, crops the sentence's length
only, and serve as bounds and controls.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from tokenizers.decoders import DecodeStream

from fusion_model.errors import FusionLMError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T", str, list[int])
VIEWS = ("prefix", "sentence", "left:K", "right:K", "masked", "previous")
CAUSAL_VIEWS = ("prefix", "previous")
ENDS_IN_FUTURE = ("sentence", "masked")
SHUFFLES = ("none", "sentence", "corpus")


def parse_view(view: str) -> tuple[str, float]:
    """`left:0.5` -> ("left", 0.5); views without a fraction get 1.

    Raises:
        FusionLMError: an unknown view, or a fraction outside 0..1.
    """
    name, _, fraction = view.partition(":")
    known = {v.partition(":")[0]: ":" in v for v in VIEWS}
    try:
        k = float(fraction) if fraction else 1.0
        valid = name in known and known[name] == bool(fraction) and 0 <= k <= 1
    except ValueError:
        valid = False
    if not valid:
        raise FusionLMError(
            f"unknown view {view!r}: choose one of {', '.join(VIEWS)}, K a fraction from 0 to 1"
        )
    return name, k


def prefix_texts(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[str]:
    """Text of the first t tokens for t = 0..len(ids); specials and unfinished characters drop."""
    stream, backend = DecodeStream(skip_special_tokens=True), tokenizer.backend_tokenizer
    texts = [""]
    for token in ids:
        texts.append(texts[-1] + (stream.step(backend, int(token)) or ""))
    return texts


def shown(prefixes: Sequence[T], view: str, previous: T, masked: Callable[[T, T], T]) -> list[T]:
    """What the encoder is shown at each position of one sentence, as text or as token ids.

    Args:
        prefixes: the first t tokens for t = 0..n.
        view: one of `VIEWS`. `left:K` is the prefix up to the first K of the sentence's tokens,
            `right:K` what of the prefix follows them, `masked` the sentence with the next token
            masked, `previous` the sentence before.
        previous: the sentence before.
        masked: a mask between what is before it and what is after.
    """
    name, k = parse_view(view)
    n, whole = len(prefixes) - 1, prefixes[-1]
    if name == "masked":
        next_ends = [len(prefix) for prefix in prefixes[1:]] + [len(whole)]
        return [masked(p, whole[end:]) for p, end in zip(prefixes, next_ends, strict=True)]
    if name in ("sentence", "previous"):
        return [whole if name == "sentence" else previous] * (n + 1)
    cut = len(prefixes[math.ceil(k * n)]) if name != "prefix" else 0
    parts = slice(cut) if name == "left" else slice(cut, None)
    return [prefix[parts] for prefix in prefixes]


def shuffle_rows(
    rows: np.ndarray, lengths: Sequence[int], shuffle: str, seed: int = 0
) -> np.ndarray:
    """Control: the embedding of another position, of the same sentence or of any.

    Args:
        rows: the store row of every position of a corpus, sentence after sentence, [P].
        lengths: positions of each sentence; they add up to P.
        shuffle: one of `SHUFFLES`.
    """
    if shuffle not in SHUFFLES:
        raise FusionLMError(f"unknown shuffle {shuffle!r}: choose one of {', '.join(SHUFFLES)}")
    generator = np.random.default_rng(seed)
    if shuffle == "corpus":
        return generator.permutation(rows)
    if shuffle == "sentence":
        ends = np.cumsum(lengths)[:-1]
        return np.concatenate([generator.permutation(part) for part in np.split(rows, ends)])
    return rows
