"""Everything that defines a training run, in one place: what resumes must match."""
# ruff: noqa: RUF009 - what `_option` gives is a field

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from fusion_model.data.text import SPLITS
from fusion_model.devices import DTYPES
from fusion_model.encoders.controls import BAGS
from fusion_model.encoders.policies import AUTO, POLICIES, parse_policy
from fusion_model.errors import FusionLMError
from fusion_model.names import FUSIONS
from fusion_model.prefixes.views import SHUFFLES, VIEWS, parse_view
from fusion_model.schema import Count, Layers, Range, Share, Size, check

SCHEDULES = ("constant", "rising", "falling")
PRECISIONS = ("float32", "bfloat16", AUTO)
AS_IN_TRAIN = "as in train"
Dropout = Annotated[float, Range(0, 1, "[)")]
Above0 = Annotated[float, Range(0, math.inf, "()")]
FromZero = Annotated[float, Range(0, math.inf, "[)")]
RunSeed = Annotated[int, Range(0, 2**23 - 1)]  # with a step beside it, a seed of PyTorch


def _option(help_text: str, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class TrainingOptions:
    """Settings of `fusion_model.training.run.train`; the command line has the same names.

    Raises:
        FusionLMError: a value that makes no sense, by name.
    """

    train_file: tuple[str, ...] = _option(
        "text file, folder of .txt files, or hf:NAME[/CONFIG][:SPLIT]; repeatable"
    )
    dev_file: tuple[str, ...] = _option("the same, for early stopping; repeatable")
    fusion: str = _option(f"where the prefix embedding enters: {', '.join(FUSIONS)}", "concat")
    encoder: str = _option("minilm, a Hugging Face name or path, tfidf, counts or zeros", "minilm")
    pooling: str = _option(
        "cls, mean, pooler, last, sep, mask, static, with @N of layer N; joined by + (auto: "
        "static+last@K+mean@K of the middle layer)",
        AUTO,
    )
    prefix_rms: FromZero = _option(
        "bring each pooling of the prefix embedding to this root mean square; 0: as it comes", 0.0
    )
    view: str = _option(f"what the encoder sees: {', '.join(VIEWS)}", "prefix")
    policy: str = _option(
        f"how often the encoder runs: {', '.join(POLICIES)} (auto: incremental where the encoder "
        "allows, else every)",
        AUTO,
    )
    shuffle: str = _option(f"control, embeddings shuffled: {', '.join(SHUFFLES)}", "none")
    split: str = _option(f"how text becomes sentences: {', '.join(SPLITS)}", "sentences")
    detokenize: bool = _option("undo WikiText's spacing first", False)
    max_tokens: Size = _option("cut longer sentences into pieces of this many tokens", 128)
    vocabulary: str = _option(
        "bpe, or encoder: the encoder's own, cut to its most frequent pieces", "bpe"
    )
    vocab_size: Size = _option("tokens in the vocabulary", 8192)
    embedding_size: Size = _option("width of token embeddings and of the projection", 512)
    hidden_size: Size = _option("width of the LSTM", 768)
    num_layers: Layers = _option("LSTM layers", 1)
    tie_weights: bool = _option("share the embedding and the output matrix", False)
    dropout: Dropout = _option("on token embeddings, between layers and on the LSTM output", 0.2)
    prefix_dropout: Share = _option("on the prefix embeddings", 0.5)
    prefix_dropout_schedule: str = _option(
        f"over the epochs: {', '.join(SCHEDULES)} (0 to 1, or 1 to 0)", "constant"
    )
    epochs: Size = _option("most epochs; the learning rate falls over all of them", 10)
    patience: Count = _option("stop after this many epochs without gain on dev; 0: never", 3)
    tokens_per_batch: Size = _option("most tokens in a batch, padding included", 2048)
    learning_rate: Above0 = _option("Adam's, after warm-up", 1e-3)
    warmup: Share = _option("share of the run in which the learning rate rises", 0.02)
    max_grad_norm: Above0 = _option("gradients are clipped to this norm", 1.0)
    precision: str = _option(
        f"of the LSTM: {', '.join(PRECISIONS)} (auto: bfloat16 where it is fast)", "float32"
    )
    encoder_dtype: str = _option(
        f"of the encoder: {', '.join(DTYPES)} (auto: bfloat16 where it is fast)", "float32"
    )
    backend: str = _option("of the recurrence: auto, torch, cudnn, triton, reference", "auto")
    seed: RunSeed = _option("of weights, order and dropout", 0)

    def __post_init__(self) -> None:
        from fusion_model.kernels import BACKENDS  # which imports PyTorch

        if not self.train_file or not self.dev_file:
            raise FusionLMError("name at least one --train-file and one --dev-file")
        choices = {
            "fusion": FUSIONS,
            "shuffle": SHUFFLES,
            "prefix_dropout_schedule": SCHEDULES,
            "precision": PRECISIONS,
            "backend": BACKENDS,
        }
        _check(self, choices)

    def prefix_dropout_at(self, epoch: int) -> float:
        """Probability in an epoch, counted from 0: constant, rising 0 to 1, or falling 1 to 0."""
        if self.prefix_dropout_schedule == "constant":
            return self.prefix_dropout
        share = epoch / max(self.epochs - 1, 1)
        return share if self.prefix_dropout_schedule == "rising" else 1 - share


@dataclass(frozen=True)
class EmbedOptions:
    """Settings of `fusion_model.training.data.embed_text`, most as in `TrainingOptions`.

    Raises:
        FusionLMError: a value that makes no sense, by name; one that a trained model has settled.
    """

    text: tuple[str, ...] = _option(
        "text file (-: standard input), folder of .txt files, or hf:NAME; repeatable"
    )
    encoder: str | None = _option("as in train (default: that of --model)", None)
    model: str | None = _option(
        "embed for this trained model, as it was trained (default: for training on the text)", None
    )
    pooling: str = _option(AS_IN_TRAIN, AUTO)
    view: str = _option(AS_IN_TRAIN, "prefix")
    policy: str = _option(AS_IN_TRAIN, AUTO)
    split: str = _option(AS_IN_TRAIN, "sentences")
    detokenize: bool = _option(AS_IN_TRAIN, False)
    max_tokens: Size = _option(AS_IN_TRAIN, 128)
    vocabulary: str = _option(AS_IN_TRAIN, "bpe")
    vocab_size: Size = _option(AS_IN_TRAIN, 8192)
    encoder_dtype: str = _option(AS_IN_TRAIN, "float32")
    store_dtype: str | None = _option("on disk: float16, float32 (default: float16)", None)
    device: str = _option("cpu, cuda, …; auto: a GPU if there is one", AUTO)
    encoder_batch: Size | None = _option("most encoder tokens at once (default: by device)", None)

    def __post_init__(self) -> None:
        _check(self, {})
        settled = ("pooling", "view", "policy", "max_tokens", "vocabulary", "vocab_size")
        for option in dataclasses.fields(self):
            given = getattr(self, option.name) != option.default
            if given and self.model is not None and option.name in settled:
                raise FusionLMError(
                    f"--{option.name.replace('_', '-')} does not go with --model: it was settled "
                    "in training"
                )
        if self.encoder is None and self.model is None:
            raise FusionLMError("name an --encoder, or the --model whose encoder it is")


def _check(options: Any, choices: dict[str, tuple[str, ...]]) -> None:
    """Hold every option to its type and its range, or to its choices."""
    choices = choices | {
        "split": SPLITS,
        "vocabulary": ("bpe", "encoder"),
        "encoder_dtype": DTYPES,
    }
    for option in dataclasses.fields(options):
        name, value = option.name.replace("_", " "), getattr(options, option.name)
        allowed = choices.get(option.name, (value,))
        if value not in allowed:
            raise FusionLMError(f"unknown {name} {value!r}: choose one of {', '.join(allowed)}")
        try:
            check(value, option.type, name)
        except ValueError as error:
            raise FusionLMError(str(error)) from None
    parse_view(options.view)
    if options.policy != AUTO:
        parse_policy(options.policy)
    if options.vocabulary == "encoder" and options.encoder in (*BAGS, "zeros"):
        raise FusionLMError(f"the encoder {options.encoder!r} has no vocabulary: use bpe")
