"""Prefixes a second: one at a time, sentence-transformers, and this project, in one run.

All word prefixes of the opening of Chesterton's *The Man Who Was Thursday* (5 000 words, public
domain), all-MiniLM-L6-v2, mean pooling; every result is checked before it is timed. Run with
`pytest benchmarks/test_prefix_encoding.py --benchmark-enable`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_model.benchmarks.suite import encoding
from fusion_model.benchmarks.suite.work import Unavailable

from fusion_model.data.text import read_text, split_sentences

TEXT = Path(__file__).parent / "thursday.txt"
DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def prefixes() -> list[str]:
    found: list[str] = []
    for sentence in split_sentences(read_text(TEXT)):
        words = sentence.split()
        found += [" ".join(words[:t]) for t in range(len(words) + 1)]
    return found


# Names of the results in benchmarks/results, and the way in fusion_model.benchmarks.suite.encoding.
WAYS = {
    "one-at-a-time": "eager",
    "sentence-transformers-32": "sentence-transformers",
    "sentence-transformers-128": "sentence-transformers-128",
    "fusion-lm": "fusion-lm",
}


def encoder_of(way: str, dtype: str) -> encoding.Encode:
    try:
        return encoding.WAYS[WAYS[way]](dtype, "cpu")
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding(benchmark: Any, way: str, dtype: str, prefixes: list[str]) -> None:
    benchmark.group = dtype
    encode = encoder_of(way, dtype)
    few = prefixes[:40]
    exact = encoder_of("one-at-a-time", "float32")(few)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    torch.testing.assert_close(encode(few), exact, atol=tolerance, rtol=tolerance)
    if benchmark.disabled:
        prefixes = few
    benchmark.pedantic(encode, (prefixes,), rounds=1)
    if benchmark.stats is not None:
        benchmark.extra_info["prefixes_per_second"] = len(prefixes) / benchmark.stats.stats.min
