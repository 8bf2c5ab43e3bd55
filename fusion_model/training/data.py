"""From training options to data: tokenizer, encoder, and both corpora with their embeddings."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from transformers import PreTrainedTokenizerBase

from fusion_model import progress
from fusion_model.attached import load_planner
from fusion_model.data.batches import Batches
from fusion_model.data.corpus import Corpus
from fusion_model.data.text import read_documents
from fusion_model.data.tokenizer import cut_vocabulary, train_bpe
from fusion_model.devices import resolve_device
from fusion_model.encoders import Encoder, load_encoder
from fusion_model.encoders.controls import BAGS, BagEncoder
from fusion_model.encoders.policies import AUTO
from fusion_model.encoders.pretrained import HFEncoder
from fusion_model.errors import EncoderError, FusionLMError
from fusion_model.files import replace_files
from fusion_model.loading import load_model, load_tokenizer
from fusion_model.prefixes.distributed import Encode, fill_store, shared_encoding
from fusion_model.prefixes.embed import embed_corpus
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.prefixes.store import EmbeddingStore
from fusion_model.prefixes.views import ENDS_IN_FUTURE, shuffle_rows
from fusion_model.schema import sha256_of
from fusion_model.training.claim import TOKENIZER, claim_texts
from fusion_model.training.options import EmbedOptions, TrainingOptions

SAMPLE = 4096  # positions by which the size of e is measured


@dataclass(frozen=True)
class TrainingData:
    """What training needs; `encoder` is None for `fusion="none"`."""

    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder | None
    train: Batches
    dev: Batches


def prepare(
    options: TrainingOptions, out: Path, store_path: Path, accelerator: Accelerator
) -> TrainingData:
    """Read, tokenise and encode; the main process writes, the others read what it wrote."""
    documents = [
        read_documents(files, options.split, options.detokenize)
        for files in (options.train_file, options.dev_file)
    ]
    hashes = [sha256_of([d.sentences for d in some]) for some in documents]
    texts = dict(zip(("train_text", "dev_text"), hashes, strict=True))
    claim_texts(out, texts, accelerator.is_main_process)
    sentences = [s for d in documents[0] for s in d.sentences]
    encoder = None
    if options.fusion != "none" or options.vocabulary == "encoder":
        encoder = _encoder(options, out, sentences, accelerator)
    with accelerator.main_process_first():
        tokenizer = _tokenizer(options, out, sentences, encoder)
    pad = tokenizer.pad_token_id
    corpora = [Corpus.from_documents(d, tokenizer, options.max_tokens) for d in documents]
    if options.fusion == "none":
        return TrainingData(tokenizer, None, *(Batches(c, None, None, pad) for c in corpora))
    assert encoder is not None
    shares = options.vocabulary == "encoder"
    planner = PrefixPlanner(encoder, tokenizer, options.view, shares)
    store, rows = _embed(options, corpora, planner, store_path, accelerator)
    train, dev = (Batches(c, r, store, pad) for c, r in zip(corpora, rows, strict=True))
    return TrainingData(tokenizer, encoder, train, dev)


def prefix_scale(data: Batches, parts: int, rms: float) -> torch.Tensor:
    """Factors [E] that bring each of the parts that e joins to this root mean square.

    Encoders' vectors differ by more than ten times: of MiniLM, `static` is at 0.06 and `last@3` at
    0.6. Adam changes all weights alike, so what is large would be learned so much faster than
    what is small, and than the LSTM.
    """
    of_part = np.split(data.sample(SAMPLE), parts, axis=1)
    factors = [rms / (float(np.sqrt((x**2).mean())) or rms) for x in of_part]
    return torch.tensor(np.repeat(factors, of_part[0].shape[1]), dtype=torch.float32)


def _encoder(
    options: TrainingOptions, out: Path, sentences: list[str], accelerator: Accelerator
) -> Encoder:
    if options.encoder in BAGS and accelerator.is_main_process:
        BagEncoder.fit(options.encoder, sentences).save(out)
    accelerator.wait_for_everyone()
    pooling, policy = _of_view(options.view, options.pooling, options.policy)
    how: dict[str, Any] = {"dtype": options.encoder_dtype, "device": accelerator.device}
    return load_encoder(options.encoder, pooling, policy=policy, directory=out, **how)


def _of_view(view: str, pooling: str, policy: str) -> tuple[str, str]:
    """Other views than `prefix` go with one policy only, and not with every pooling."""
    if view in ENDS_IN_FUTURE:
        if "static" in pooling:
            raise FusionLMError(
                f"view {view!r} goes with poolings without static, which would be of its last "
                "token, one to come: use mean"
            )
        pooling = "mean" if pooling == AUTO else pooling
    return pooling, "every" if policy == AUTO and view != "prefix" else policy


def _tokenizer(
    options: TrainingOptions, out: Path, sentences: list[str], encoder: Encoder | None
) -> PreTrainedTokenizerBase:
    if (out / TOKENIZER).exists():
        return load_tokenizer(out)
    made = make_tokenizer(options.vocabulary, options.vocab_size, sentences, encoder)
    with replace_files(out) as folder:
        made.save_pretrained(folder)
    return made


def make_tokenizer(
    vocabulary: str, vocab_size: int, sentences: list[str], encoder: Encoder | None
) -> PreTrainedTokenizerBase:
    """The tokenizer that training on these sentences uses.

    Args:
        vocabulary: `bpe`, or `encoder`: cut from the encoder's.
    """
    if vocabulary == "bpe":
        return train_bpe(sentences, vocab_size)
    if not isinstance(encoder, HFEncoder):
        raise EncoderError("--vocabulary encoder needs a Hugging Face encoder")
    return cut_vocabulary(encoder.tokenizer, sentences, vocab_size)


def _embed(
    options: TrainingOptions,
    corpora: list[Corpus],
    planner: PrefixPlanner,
    path: Path,
    accelerator: Accelerator,
) -> tuple[EmbeddingStore, list[np.ndarray]]:
    """The store of all vectors, which can be read, and the row of every position, [P] each."""
    rank, world = accelerator.process_index, accelerator.num_processes

    def embed(encode: Encode | None) -> tuple[EmbeddingStore, list[np.ndarray]]:
        rows = []
        with planner.open_store(path, writable=rank == 0) as store:
            for name, corpus in zip(("train", "dev"), corpora, strict=True):
                size = sum(corpus.positions)
                with progress.track(f"prefix embeddings, {name}", size) as update:
                    found = embed_corpus(corpus, planner, store, update, encode)
                rows.append(shuffle_rows(found, corpus.positions, options.shuffle, options.seed))
        return store, rows

    with shared_encoding(planner.encoder, rank, world) as encode:
        if rank == 0:
            result = embed(encode)
    accelerator.wait_for_everyone()
    return embed(None) if rank else result


def embed_text(options: EmbedOptions, out: Path) -> tuple[int, int] | None:
    """Fill the store `out` with what training on a text needs, or what a model needs to score it.

    Returns vectors in the store and positions of the text; under `accelerate launch` all
    processes encode, and only the main one returns a result. An existing store keeps its dtype.
    """
    device = resolve_device(options.device)
    state = PartialState(cpu=torch.device(device).type == "cpu")
    rank, world = state.process_index, state.num_processes
    how: dict[str, Any] = {
        "dtype": options.encoder_dtype,
        "device": device if world == 1 else state.device,
        "tokens_per_batch": options.encoder_batch,
    }
    documents = read_documents(options.text, options.split, options.detokenize)
    limit: int | None = None
    if options.model is not None:
        model, tokenizer = load_model(options.model)
        planner = load_planner(
            model.config, tokenizer, options.model, encoder=options.encoder, **how
        )
    else:
        assert options.encoder is not None
        pooling, policy = _of_view(options.view, options.pooling, options.policy)
        encoder = load_encoder(options.encoder, pooling, policy=policy, **how)
        limit = options.max_tokens
        sentences = [s for d in documents for s in d.sentences]
        tokenizer = make_tokenizer(options.vocabulary, options.vocab_size, sentences, encoder)
        shares = options.vocabulary == "encoder"
        planner = PrefixPlanner(encoder, tokenizer, options.view, shares)
    corpus = Corpus.from_documents(documents, tokenizer, limit)
    vectors = fill_store(corpus, planner, out, rank, world, options.store_dtype)
    return None if vectors is None else (vectors, sum(corpus.positions))
