"""A saved model, whole: weights, tokenizer and encoder, with `score`, `perplexity`, `generate`."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from fusion_model import progress
from fusion_model.config import FusionLMConfig
from fusion_model.corpus import BatchSource
from fusion_model.encoders import load_encoder
from fusion_model.errors import CheckpointError, EncoderError, FusionLMError
from fusion_model.hf_encoder import resolve_dtype
from fusion_model.model import FusionLMForCausalLM
from fusion_model.planning import Corpus, PrefixPlanner, check_causal, embed_corpus
from fusion_model.prefixes import CAUSAL_VIEWS, shuffle_rows
from fusion_model.scoring import score_articles, score_sentences, word_boundary_ids
from fusion_model.store import EmbeddingStore, MemoryStore, Vectors
from fusion_model.streaming import PrefixStream
from fusion_model.text import Document, split_sentences
from fusion_model.words import Perplexity, WordScore, check_context, text_perplexity, word_scores

SHIPPED = Path(__file__).parent / "checkpoints"


class PrefixCache(PrefixStream):
    """`PrefixStream` as the model calls them: with tensors."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, start: int) -> Tensor:
        """See `fusion_model.model.PrefixEncoder`."""
        vectors = torch.stack(self.of_rows(input_ids.tolist(), start))
        return vectors.view(len(input_ids), -1, vectors.shape[-1]).to(input_ids.device)


class FusionLM:
    """A model with its tokenizer and encoder; `fusion_model.load` makes one.

    Attributes:
        model: the `FusionLMForCausalLM`, in evaluation mode.
        tokenizer: adds neither BOS nor EOS by itself.
        planner: prefixes to encoder; None for an unfused model.
    """

    def __init__(
        self,
        model: FusionLMForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        planner: PrefixPlanner | None,
    ) -> None:
        self.model, self.tokenizer, self.planner = model.eval(), tokenizer, planner
        if planner is not None and planner.view in CAUSAL_VIEWS:
            model.prefix_encoder = PrefixCache(planner)

    def encode_corpus(self, corpus: Corpus, store: Vectors | None = None) -> BatchSource:
        """The corpus with the embeddings of its positions, in memory or in `store`."""
        pad = int(self.tokenizer.pad_token_id)
        if self.planner is None:
            return BatchSource(corpus, None, None, pad)
        if store is None:
            store = MemoryStore(self.planner.encoder.dim)
        with progress.track("prefix embeddings", sum(corpus.positions)) as update:
            rows = embed_corpus(corpus, self.planner, store, update)
        rows = shuffle_rows(rows, corpus.positions, self.model.config.shuffle)
        return BatchSource(corpus, rows, store, pad)

    def open_store(self, path: Path | str | None) -> AbstractContextManager[Vectors | None]:
        """The store of this model's embeddings at `path`; nothing for an unfused model."""
        if path is None or self.planner is None:
            return nullcontext()
        encoder = self.planner.encoder
        return EmbeddingStore(
            path, encoder.fingerprint, self.planner.view, encoder.dim, policy=encoder.policy
        )

    def perplexity(self, documents: Sequence[Document], store: Vectors | None = None) -> Perplexity:
        """How well the model predicts these documents, sentence by sentence."""
        corpus = Corpus.from_documents(documents, self.tokenizer)
        scores = score_sentences(self.model, self.encode_corpus(corpus, store))
        return text_perplexity(documents, corpus, scores)

    def score(
        self,
        text: str | Sequence[Document],
        *,
        context: str = "sentence",
        whitespace_correction: bool = False,
        store: Vectors | None = None,
    ) -> list[WordScore]:
        """Surprisal of every word, the first too, and of every sentence end.

        Args:
            text: plain text, split into sentences here, or documents.
            context: `sentence`, as the model is trained, or `article`: the LSTM's state goes
                on through each document.
            whitespace_correction: see `fusion_model.words.sum_words`.

        Raises:
            FusionLMError: unknown context; a correction that the vocabulary does not allow; a
                sentence longer than the encoder's window.
        """
        check_context(context)
        documents = [Document("text", split_sentences(text))] if isinstance(text, str) else text
        boundary = word_boundary_ids(self.tokenizer) if whitespace_correction else None
        corpus = Corpus.from_documents(documents, self.tokenizer)
        source = self.encode_corpus(corpus, store)
        if context == "sentence":
            scores = score_sentences(self.model, source, boundary)
        else:
            starts = corpus.starts_document
            scores = list(score_articles(self.model, source, starts, boundary))
        return word_scores(self.tokenizer, documents, scores)

    def prompt_ids(self, prompt: str) -> Tensor:
        """BOS and the prompt's tokens, [1, T]."""
        ids = self.tokenizer(" ".join(prompt.split()), add_special_tokens=False)["input_ids"]
        return torch.tensor([[self.tokenizer.bos_token_id, *ids]], device=self.model.device)

    def generate(self, prompt: str, *, seed: int | None = None, **options: Any) -> list[str]:
        """Continuations of a prompt, which they include.

        Args:
            prompt: may be empty.
            seed: for sampling.
            **options: of `transformers.GenerationMixin.generate`: `max_new_tokens`, `do_sample`,
                `temperature`, `top_k`, `top_p`, `num_beams`, `num_return_sequences`, `streamer`, …

        Raises:
            FusionLMError: the model's view sees the future.
        """
        check_causal(self.planner)
        if seed is not None:
            set_seed(seed)
        ids = self.prompt_ids(prompt)
        try:
            out = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        except ValueError as error:
            raise FusionLMError(f"cannot generate: {error}") from error
        texts: list[str] = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return texts


def load(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    encoder: str | None = None,
    encoder_dtype: str = "float32",
    backend: str = "auto",
    policy: str | None = None,
) -> FusionLM:
    """A saved model with tokenizer and encoder: safetensors only, no remote code.

    Args:
        name: folder, hub name, or a model that ships: `fusion-lm-small` and its unfused twin
            `fusion-lm-small-unfused`.
        device: where the model and the encoder run.
        dtype: `float32`, `bfloat16`, `float16` or `auto`, of the language model.
        encoder: where the encoder lies now, if it moved since training.
        encoder_dtype: as `dtype`, of the encoder.
        backend: one of `fusion_model.kernels.BACKENDS`.
        policy: in place of the model's own, to measure what it costs: the scores are then of
            embeddings that the model was not trained with.

    Raises:
        CheckpointError: missing, damaged, pickled, or no fusion language model.
        EncoderError: the encoder is missing, or is not the one of the training.
    """
    model, tokenizer = load_model(name)
    model.to(device=device, dtype=resolve_dtype(dtype, device))  # type: ignore[call-arg]
    try:
        model.set_backend(backend)
    except ValueError as error:
        raise FusionLMError(str(error)) from None
    config = model.config
    if config.fusion == "none":
        if policy is not None:
            raise FusionLMError(f"{name} is unfused: it has no encoding policy")
        return FusionLM(model, tokenizer, None)
    found = load_encoder(
        encoder or str(config.encoder),
        config.pooling,
        dtype=encoder_dtype,
        device=device,
        directory=Path(name),
        dim=config.prefix_size,
        policy=policy or config.policy,
    )
    if found.content_sha256 != config.encoder_sha256:
        raise EncoderError(
            f"{name} was trained with another encoder than {found.name} holds now (sha256 "
            f"{str(config.encoder_sha256)[:12]}…, found {found.content_sha256[:12]}…): name the "
            "right one with --encoder"
        )
    shares = config.shares_vocabulary
    return FusionLM(model, tokenizer, PrefixPlanner(found, tokenizer, config.view, shares))


def load_model(name: str) -> tuple[FusionLMForCausalLM, PreTrainedTokenizerBase]:
    """Weights in float32 and tokenizer, without the encoder; `name` and errors as in `load`."""
    source = str(SHIPPED / name) if (SHIPPED / name).is_dir() else name
    path = Path(source)
    if path.is_dir() and not (path / "model.safetensors").exists():
        if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pkl")):
            raise CheckpointError(
                f"{source} holds pickled weights, which can run code when loaded: they are never "
                "read; convert them to model.safetensors"
            )
        begun = " (a training run has begun there, and no epoch is finished)"
        raise CheckpointError(
            f"{source} holds no model.safetensors{begun if list(path.glob('*.json')) else ''}: "
            "name a folder that fusion-lm train wrote"
        )
    try:
        config = AutoConfig.from_pretrained(source)
        if not isinstance(config, FusionLMConfig):
            raise CheckpointError(f"{source} is a {config.model_type} model, not a fusion-lm one")
        loaded: Any = FusionLMForCausalLM.from_pretrained(
            source, config=config, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        where = "a damaged file" if path.is_dir() else "no such folder, and no hub model reached"
        raise CheckpointError(f"cannot load the model {source}: {where} ({reason})") from error
    model: FusionLMForCausalLM = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise CheckpointError(f"{source} lacks weights ({', '.join(missing)}): it is damaged")
    return model.float(), tokenizer
