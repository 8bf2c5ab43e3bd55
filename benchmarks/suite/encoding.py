"""Ways to get the embeddings of many prefixes from all-MiniLM-L6-v2, mean of tokens."""

from collections.abc import Callable, Sequence

import torch
from fusion_model.benchmarks.suite.work import Unavailable

from fusion_model.encoders import load_encoder
from fusion_model.encoders.pretrained import HFEncoder, minilm_path
from fusion_model.errors import EncoderError

Encode = Callable[[Sequence[str]], torch.Tensor]


def mean_encoder(dtype: str, device: str) -> HFEncoder:
    """The encoder itself.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        encoder = load_encoder("minilm", "mean", dtype=dtype, device=device)
    except EncoderError as error:
        raise Unavailable(str(error)) from None
    assert isinstance(encoder, HFEncoder)
    return encoder


def one_at_a_time(dtype: str, device: str) -> Encode:
    """A call a prefix."""
    encoder = mean_encoder(dtype, device)

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> torch.Tensor:
        vectors = []
        for text in texts:
            ids = torch.tensor([encoder.tokenizer(text)["input_ids"]], device=device)
            vectors.append(encoder.model(input_ids=ids).last_hidden_state.mean(1)[0].float())
        return torch.stack(vectors)

    return encode


def sentence_transformers(dtype: str, device: str, batch_size: int) -> Encode:
    """Their `encode`, without its normalisation."""
    try:
        import sentence_transformers as library
    except ImportError:
        raise Unavailable("sentence-transformers is not installed: the extra [bench]") from None
    whole = library.SentenceTransformer(str(minilm_path()), device=device)
    modules = list(whole.children())[:2]  # transformer and pooling
    model = library.SentenceTransformer(modules=modules, device=device)
    model.max_seq_length = 512
    model = model.to(getattr(torch, dtype))

    def encode(texts: Sequence[str]) -> torch.Tensor:
        vectors: torch.Tensor = model.encode(
            list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False
        )
        return vectors.float()

    return encode


def fusion_lm(dtype: str, device: str) -> Encode:
    """Ours: duplicates dropped, equal lengths together."""
    encoder = mean_encoder(dtype, device)
    return lambda texts: encoder.encode(encoder.inputs_from_texts(texts))


WAYS: dict[str, Callable[[str, str], Encode]] = {
    "eager": one_at_a_time,
    "sentence-transformers": lambda dtype, device: sentence_transformers(dtype, device, 32),
    "sentence-transformers-128": lambda dtype, device: sentence_transformers(dtype, device, 128),
    "fusion-lm": fusion_lm,
}
