"""How often the encoder runs: one `policy` of model, store and command line.

A sentence of n tokens has positions t = 0..n. Where a policy does not encode the prefix of t, its
vector is that of an earlier position, the anchor. Pooling `static` costs no encoder work and is
of the last token under every policy. Nothing here needs PyTorch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fusion_model.errors import FusionLMError

POLICIES = ("every", "word", "stride:K", "sentence", "incremental", "incremental+refresh:K")
AUTO = "auto"
HOLDING = ("word", "stride", "sentence")  # a vector is used at several positions


@dataclass(frozen=True)
class Policy:
    """A parsed policy.

    Attributes:
        name: `every`, `word`, `stride`, `sentence` or `incremental`.
        k: tokens between exact encodings; 0 for a policy without.
    """

    name: str
    k: int = 0

    def anchors(self, starts_word: Sequence[bool]) -> list[int]:
        """The position whose prefix is encoded, for each position of a sentence.

        A word's end shows only once the next word begins, so under `word` a word is encoded with
        its first token.

        Args:
            starts_word: of each token, [n].
        """
        if self.k:
            return [t - t % self.k for t in range(len(starts_word) + 1)]
        anchors = [0]
        for t, starts in enumerate(starts_word, start=1):
            anchors.append(anchors[-1] if self.name == "word" and not starts else t)
        return anchors


def parse_policy(policy: str) -> Policy:
    """`stride:4` -> Policy("stride", 4); `incremental+refresh:8` -> Policy("incremental", 8).

    Raises:
        FusionLMError: an unknown policy, or a K below 1.
    """
    name, _, count = policy.replace("incremental+refresh", "refresh").partition(":")
    if name in ("stride", "refresh") and count.isdecimal() and int(count) > 0:
        return Policy("incremental" if name == "refresh" else name, int(count))
    if policy in POLICIES and not policy.endswith(":K"):
        return Policy(policy)
    raise FusionLMError(
        f"unknown policy {policy!r}: choose one of {', '.join((AUTO, *POLICIES))}, K a number of "
        "tokens from 1"
    )
