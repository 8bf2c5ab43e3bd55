"""A saved model, whole: weights, tokenizer and encoder, with `score`, `perplexity`, `generate`."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from fusion_model import progress
from fusion_model.data.batches import BatchSource, Vectors
from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document, split_sentences
from fusion_model.errors import FusionLMError
from fusion_model.model import FusionLMForCausalLM
from fusion_model.prefixes.embed import embed_corpus
from fusion_model.prefixes.planner import PrefixPlanner, check_causal
from fusion_model.prefixes.store import EmbeddingStore, MemoryStore
from fusion_model.prefixes.stream import PrefixStream
from fusion_model.prefixes.views import CAUSAL_VIEWS, shuffle_rows
from fusion_model.scoring import score_articles, score_sentences, word_boundary_ids
from fusion_model.surprisal import (
    Perplexity,
    WordScore,
    check_context,
    text_perplexity,
    word_scores,
)


class PrefixCache(PrefixStream):
    """`PrefixStream` as the model calls them: with tensors."""

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, start: int) -> Tensor:
        """See `fusion_model.model.PrefixEncoder`."""
        vectors = torch.stack([*map(torch.as_tensor, self.of_rows(input_ids.tolist(), start))])
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
            whitespace_correction: see `fusion_model.surprisal.sum_words`.

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
