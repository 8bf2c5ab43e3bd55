"""Small models, encoders and texts, all made here: no download, no file outside the repository."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: kernels run on the CPU
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU is for `fusion-lm gpu-check`

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)
from transformers.utils import logging

from fusion_model import FusionLMConfig, FusionLMForCausalLM
from fusion_model.data.tokenizer import train_bpe
from fusion_model.training.options import TrainingOptions
from fusion_model.training.run import train

logging.disable_progress_bar()
logging.set_verbosity_error()

SHARED = Path(__file__).parents[2] / "shared" / "data"
SENTENCES = [
    "The cat sat on the mat.",
    "The dog sat on the mat.",
    "A cat is not a dog, is it?",
    "She said that the cat had gone.",
    "Nobody sat there.",
    "The mat was on the floor of the house.",
    "He saw the dog and the cat in the house.",
    "Was it the cat or the dog that sat on the floor?",
] * 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(SENTENCES) + "\n")
    return path


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return train_bpe(SENTENCES, 300)


def wordpiece(
    specials: Sequence[str] = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer over the sentences above, with letters for everything else."""
    pad, unk, cls, sep, mask = specials
    words = sorted({w.strip(".,?").lower() for s in SENTENCES for w in s.split()})
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,?'!-"
    pieces = [*specials, *letters, *("##" + c for c in letters), *words]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=unk))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        special_tokens=[(cls, vocabulary[cls]), (sep, vocabulary[sep])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        unk_token=unk,
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
    )


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ARCHITECTURES = {
    "bert": (BertModel, BertConfig, SMALL | {"intermediate_size": 32}),
    "roberta": (RobertaModel, RobertaConfig, SMALL | {"intermediate_size": 32, "pad_token_id": 0}),
    "mpnet": (MPNetModel, MPNetConfig, SMALL | {"intermediate_size": 32, "pad_token_id": 0}),
    "distilbert": (DistilBertModel, DistilBertConfig, {"dim": 16, "n_layers": 2, "n_heads": 2}),
}


@pytest.fixture(scope="session")
def encoder_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each architecture, with random weights."""
    folders = {}
    for name, (model_class, config_class, options) in ARCHITECTURES.items():
        torch.manual_seed(1)
        tokenizer = wordpiece()
        config = config_class(vocab_size=len(tokenizer), max_position_embeddings=64, **options)
        folder = tmp_path_factory.mktemp(name)
        model = model_class(config)
        # Larger than the default initialisation, so that tokens differ enough to be told apart.
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(20)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[name] = folder
    return folders


@pytest.fixture(scope="session")
def bert_folder(encoder_folders: dict[str, Path]) -> Path:
    return encoder_folders["bert"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, bert_folder: Path) -> Path:
    """A folder with a text and models trained on it, `none` and `concat`; not to be changed."""
    folder = tmp_path_factory.mktemp("cli")
    text = folder / "text.txt"
    text.write_text("\n".join(SENTENCES))
    options = {"vocab_size": 300, "embedding_size": 8, "hidden_size": 12, "epochs": 1}
    for fusion in ("none", "concat"):
        files = {"train_file": (str(text),), "dev_file": (str(text),)}
        encoder = {"encoder": str(bert_folder), "pooling": "mean", "fusion": fusion}
        train(TrainingOptions(**files, **options, **encoder, split="lines"), folder / fusion)
    return folder


@pytest.fixture
def options(text_file: Path, bert_folder: Path) -> Callable[..., TrainingOptions]:
    """Options of a small run, with changes."""

    def make(**changes: Any) -> TrainingOptions:
        fields = {
            "train_file": (str(text_file),),
            "dev_file": (str(text_file),),
            "split": "lines",
            "encoder": str(bert_folder),
            "pooling": "mean",
            "vocab_size": 300,
            "embedding_size": 8,
            "hidden_size": 12,
            "epochs": 3,
            "tokens_per_batch": 64,
            "learning_rate": 0.01,
        } | changes
        return TrainingOptions(**fields)

    return make


def small_model(**options: object) -> FusionLMForCausalLM:
    """A model with random weights, in evaluation mode; e is scaled where it is projected."""
    fields = {
        "vocab_size": 30,
        "embedding_size": 6,
        "hidden_size": 8,
        "prefix_size": 5,
        "initializer_range": 0.5,
        "scale_prefix": options.get("prefix_size", 5) == 5 and options.get("fusion") != "none",
    } | options
    model = FusionLMForCausalLM(FusionLMConfig(**fields)).eval()
    if model.prefix_scale is not None:
        model.prefix_scale.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("../shared/data, the developers' corpora, is not here")
    return SHARED
