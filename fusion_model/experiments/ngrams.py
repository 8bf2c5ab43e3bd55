"""Models that only count: the bar that a trained one has to clear.

Interpolated Kneser-Ney with three discounts an order (Chen & Goodman 1999, section 3), on token
ids. `nltk` has one discount and takes hours; KenLM has to be compiled.
"""

from collections.abc import Sequence

import numpy as np


class KneserNey:
    """An n-gram model of sentences `BOS … EOS`; before BOS there are more of it.

    Args:
        sentences: ids to count.
        vocabulary: V; the lowest order is mixed with 1 / V.
        order: n; 1 is the unigram model.
    """

    def __init__(self, sentences: Sequence[Sequence[int]], vocabulary: int, order: int = 3) -> None:
        self.vocabulary, self.order = vocabulary, order
        grams, counts = np.unique(self._keys(sentences, order), return_counts=True)
        self._levels = []
        for n in range(order, 0, -1):
            self._levels.append(self._level(grams, counts))
            # Below the highest order: in how many ways a gram is continued to the left.
            grams, counts = np.unique(grams % vocabulary ** (n - 1), return_counts=True)
        self._levels.reverse()
        self.grams = sum(len(level[0]) for level in self._levels)  # that are kept, of all orders

    def nats(self, sentences: Sequence[Sequence[int]]) -> np.ndarray:
        """-log p of every token but the first of each sentence, [N]."""
        keys = self._keys(sentences, self.order)
        p = np.full(len(keys), 1 / self.vocabulary)
        for n, (grams, kept, contexts, totals, left) in enumerate(self._levels, start=1):
            own = keys % self.vocabulary**n
            before = own // self.vocabulary
            total = _of(contexts, totals, before)
            seen = total > 0
            found = _of(grams, kept, own) + _of(contexts, left, before) * p
            p = np.where(seen, found / np.where(seen, total, 1), p)
        return -np.log(p)

    def _keys(self, sentences: Sequence[Sequence[int]], n: int) -> np.ndarray:
        """A number for each token with the n - 1 before it, [N] int64."""
        keys = []
        for ids in sentences:
            padded = np.array([*[ids[0]] * (n - 2), *ids] if n > 1 else ids[1:], dtype=np.int64)
            windows = np.lib.stride_tricks.sliding_window_view(padded, n)
            keys.append(windows @ self.vocabulary ** np.arange(n - 1, -1, -1))
        return np.concatenate(keys)

    def _level(self, grams: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of one order: grams with their discounted counts; contexts with their totals and with
        what the discounts left for the order below."""
        n1, n2, n3, n4 = (max(int((counts == i).sum()), 1) for i in (1, 2, 3, 4))
        y = n1 / (n1 + 2 * n2)
        discounts = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        discount = np.clip(discounts, 0, [1, 2, 3])[np.minimum(counts, 3) - 1]
        contexts, inverse = np.unique(grams // self.vocabulary, return_inverse=True)
        totals = np.bincount(inverse, counts)
        return grams, counts - discount, contexts, totals, np.bincount(inverse, discount)


def _of(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The values of wanted keys, 0 where there is none; keys ascend."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
