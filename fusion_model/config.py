"""What a fusion language model is made of, and how its prefixes were encoded."""

from typing import ClassVar

from transformers import PreTrainedConfig

from fusion_model.names import EARLY as EARLY
from fusion_model.names import FUSIONS
from fusion_model.names import LATE as LATE
from fusion_model.schema import Count, Layers, Share, Size, check


class FusionLMConfig(PreTrainedConfig):
    """Configuration of `FusionLMForCausalLM`; the defaults are the paper's (arXiv 2208.02402).

    Args:
        vocab_size: V, number of tokens.
        embedding_size: D, width of the token embeddings and of the features before `lm_head`.
        hidden_size: H, width of the LSTM.
        num_layers: LSTM layers.
        fusion: where the prefix embedding enters, one of `FUSIONS`.
        prefix_size: E, width of the prefix embeddings (unused for `fusion="none"`).
        tie_weights: `lm_head` shares its matrix with `embed_tokens`.
        dropout: probability on token embeddings, between layers and on the LSTM's output.
        prefix_dropout: probability on the prefix embeddings.
        encoder: Hugging Face name or path, `minilm`, `tfidf`, `counts` or `zeros`.
        encoder_sha256: content hash of the encoder that the model was trained with.
        pooling: see `fusion_model.encoders.pooling.POOLINGS`; several are joined by `+`.
        view: what the encoder is shown, see `fusion_model.prefixes.views.VIEWS`.
        scale_prefix: the model has a factor for each element of e, which training measured.
        policy: how often the encoder runs, one of `fusion_model.encoders.policies.POLICIES`.
        shuffle: control, `none`, `sentence` or `corpus`.
        shares_vocabulary: tokens are pieces of the encoder's own vocabulary, so that prefixes go
            to the encoder as tokens and not as text.

    Raises:
        ValueError: an unknown fusion, or a value of another type or out of range.
    """

    model_type = "fusion_lm"
    attribute_map: ClassVar[dict[str, str]] = {
        "tie_word_embeddings": "tie_weights",
        "num_hidden_layers": "num_layers",
    }

    vocab_size: Size = 8192
    embedding_size: Size = 512
    hidden_size: Size = 768
    num_layers: Layers = 1
    fusion: str = "concat"
    prefix_size: Size = 768
    scale_prefix: bool = False
    tie_weights: bool = False
    dropout: Share = 0.0
    prefix_dropout: Share = 0.0
    initializer_range: float = 0.05
    encoder: str | None = None
    encoder_sha256: str | None = None
    pooling: str = "cls"
    view: str = "prefix"
    policy: str = "every"
    shuffle: str = "none"
    shares_vocabulary: bool = False
    use_cache: bool = True
    pad_token_id: Count | None = 0
    bos_token_id: Count | None = 1
    eos_token_id: Count | None = 2

    def __post_init__(self, **kwargs: object) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"unknown fusion {self.fusion!r}: choose one of {', '.join(FUSIONS)}")
        for name, kind in FusionLMConfig.__annotations__.items():
            if name != "attribute_map":
                check(getattr(self, name), kind, name)
        super().__post_init__(**kwargs)
