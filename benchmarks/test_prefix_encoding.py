"""Prefixes a second: one at a time, sentence-transformers, and this project, in one run.

All word prefixes of the opening of Chesterton's *The Man Who Was Thursday* (5 000 words, public
domain), all-MiniLM-L6-v2, mean pooling; every result is checked before it is timed. Run with
`pytest benchmarks/test_prefix_encoding.py --benchmark-enable`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_model.encoders import load_encoder, minilm_path
from fusion_model.errors import EncoderError
from fusion_model.hf_encoder import HFEncoder
from fusion_model.text import read_text, split_sentences

TEXT = Path(__file__).parent / "thursday.txt"
DTYPES = ("float32", "bfloat16")
Encode = Callable[[Sequence[str]], torch.Tensor]


@pytest.fixture(scope="module")
def prefixes() -> list[str]:
    found: list[str] = []
    for sentence in split_sentences(read_text(TEXT)):
        words = sentence.split()
        found += [" ".join(words[:t]) for t in range(len(words) + 1)]
    return found


def minilm(dtype: str) -> HFEncoder:
    try:
        encoder = load_encoder("minilm", "mean", dtype=dtype)
    except EncoderError as error:
        pytest.skip(str(error))
    assert isinstance(encoder, HFEncoder)
    return encoder


def one_at_a_time(dtype: str) -> Encode:
    encoder = minilm(dtype)

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> torch.Tensor:
        vectors = []
        for text in texts:
            ids = torch.tensor([encoder.tokenizer(text)["input_ids"]])
            vectors.append(encoder.model(input_ids=ids).last_hidden_state.mean(1)[0].float())
        return torch.stack(vectors)

    return encode


def sentence_transformers(dtype: str, batch_size: int) -> Encode:
    library = pytest.importorskip("sentence_transformers", reason="needs the extra [bench]")
    whole = library.SentenceTransformer(str(minilm_path()), device="cpu")
    modules = list(whole.children())[:2]  # transformer and pooling, without the normalisation
    model = library.SentenceTransformer(modules=modules, device="cpu")
    model.max_seq_length = 512
    model = model.to(getattr(torch, dtype))

    def encode(texts: Sequence[str]) -> torch.Tensor:
        vectors: torch.Tensor = model.encode(
            list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return vectors.float()

    return encode


def fusion_lm(dtype: str) -> Encode:
    encoder = minilm(dtype)
    return lambda texts: encoder.encode(encoder.items_from_texts(texts))


WAYS: dict[str, Callable[[str], Encode]] = {
    "one-at-a-time": one_at_a_time,
    "sentence-transformers-32": lambda dtype: sentence_transformers(dtype, 32),
    "sentence-transformers-128": lambda dtype: sentence_transformers(dtype, 128),
    "fusion-lm": fusion_lm,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding(benchmark: Any, way: str, dtype: str, prefixes: list[str]) -> None:
    benchmark.group = dtype
    encode = WAYS[way](dtype)
    few = prefixes[:40]
    exact = one_at_a_time("float32")(few)
    tolerance = 1e-5 if dtype == "float32" else 0.05
    torch.testing.assert_close(encode(few), exact, atol=tolerance, rtol=tolerance)
    if benchmark.disabled:
        prefixes = few
    benchmark.pedantic(encode, (prefixes,), rounds=1)
    if benchmark.stats is not None:
        benchmark.extra_info["prefixes_per_second"] = len(prefixes) / benchmark.stats.stats.min
