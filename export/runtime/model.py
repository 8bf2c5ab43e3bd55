"""An exported model: `score`, `perplexity` and `generate` without PyTorch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fusion_model.export.manifest import SEQUENCE, STEP, TOKENIZER, read_manifest
from fusion_model.export.runtime.encoder import open_encoder
from fusion_model.export.runtime.generation import GenerationOptions, generate_rows
from fusion_model.export.runtime.sequences import Sequences, VectorRows
from fusion_model.export.runtime.session import (
    check_version,
    choose_device,
    default_threads,
    open_session,
    runtime,
)
from fusion_model.export.runtime.steps import Steps
from fusion_model.export.runtime.tokenizer import TextTokenizer

from fusion_model import progress
from fusion_model.data.batches import Batching
from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document, split_sentences
from fusion_model.errors import ExportError
from fusion_model.prefixes.embed import embed_corpus
from fusion_model.prefixes.planner import PrefixPlanner, check_causal
from fusion_model.prefixes.stream import PrefixStream
from fusion_model.prefixes.views import shuffle_rows
from fusion_model.surprisal import (
    Perplexity,
    SentenceScores,
    WordScore,
    boundary_ids,
    check_context,
    text_perplexity,
    word_scores,
)


class OnnxFusionLM:
    """What `fusion-lm export` wrote, called as `fusion_model.FusionLM` is.

    Args:
        folder: of the export.
        device: `cpu`, `cuda`, or `auto`: CUDA where this ONNX Runtime has it.
        threads: of one operator (default: the cores that this process may use).

    Attributes:
        manifest: what was exported and verified.
        device, threads: those chosen.
        tokenizer: adds neither BOS nor EOS by itself.

    Raises:
        ExportError: no export, or not the files that were exported; ONNX Runtime missing or too
            old; the device is not there, or nodes fell from it to the CPU.
    """

    def __init__(
        self, folder: str | Path, *, device: str = "auto", threads: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self.device = choose_device(device)
        self.threads = default_threads() if threads is None else threads
        self.manifest = read_manifest(self.folder)
        check_version(runtime().__version__, self.manifest["oldest_onnxruntime"])
        self.model: dict[str, Any] = self.manifest["model"]
        described = self.manifest["tokenizer"]
        self.tokenizer = TextTokenizer(self.folder / TOKENIZER, described)
        self._sequences = Sequences(self._open(SEQUENCE), self.model)
        self._step_session: Any = None  # opened when something is generated
        self._planner: PrefixPlanner | None = None
        self._cache: PrefixStream | None = None

    def _open(self, name: str) -> Any:
        return open_session(self.folder / name, self.device, self.threads)

    @property
    def planner(self) -> PrefixPlanner | None:
        """Prefixes to encoder; None for an unfused model. The encoder is opened when asked for.

        Raises:
            ExportError: the model was exported without its encoder.
        """
        if self._planner is None and self.model["fusion"] != "none":
            encoder = open_encoder(self.folder, self.manifest, self.device, self.threads)
            view, shares = self.model["view"], self.model["shares_vocabulary"]
            self._planner = PrefixPlanner(encoder, self.tokenizer, view, shares)
        return self._planner

    def token_log_probs(
        self,
        input_ids: np.ndarray,
        prefix_embeds: np.ndarray | None = None,
        lengths: np.ndarray | None = None,
    ) -> np.ndarray:
        """log p of tokens 1..T-1 given what precedes, in nats: the real ones only, row by row.

        Args:
            input_ids: [B, T] int64, padded on the right.
            prefix_embeds: [B, T - 1, E], position t holds the embedding of tokens 0..t; or
                [B, E], one vector a sequence.
            lengths: number of real tokens of each row, [B] (default: T).

        Returns:
            [sum of (lengths - 1)], float32.

        Raises:
            ExportError: ids or embeddings of the wrong width, shape or type.
        """
        input_ids = np.asarray(input_ids)
        read = input_ids[:, :-1] if input_ids.ndim == 2 else input_ids
        e = None if prefix_embeds is None else np.asarray(prefix_embeds)
        if e is not None and e.ndim == 2:
            e = np.repeat(e[:, None], read.shape[1], axis=1)
        self._sequences.check(read, e)
        ids = input_ids.astype(np.int64, copy=False)
        target, _, _ = self._sequences.run(ids[:, :-1], ids[:, 1:], e, np.zeros(1, np.int64))
        if lengths is None:
            return target.ravel()
        real = np.arange(target.shape[1]) < (np.asarray(lengths) - 1)[:, None]
        return target[real]

    def _score(
        self, documents: Sequence[Document], context: str, boundary: list[int] | None
    ) -> tuple[Corpus, list[SentenceScores]]:
        corpus = Corpus.from_documents(documents, self.tokenizer)
        rows = vectors = None
        if self.planner is not None:
            vectors = VectorRows(self.planner.encoder.dim)
            with progress.track("prefix embeddings", sum(corpus.positions)) as update:
                rows = embed_corpus(corpus, self.planner, vectors, update)
            rows = shuffle_rows(rows, corpus.positions, self.model["shuffle"])
        batching = Batching(corpus, rows, self.tokenizer.pad_token_id or 0)
        if context == "sentence":
            return corpus, self._sequences.score_sentences(batching, vectors, boundary)
        starts = corpus.starts_document
        return corpus, list(self._sequences.score_articles(batching, vectors, starts, boundary))

    def perplexity(self, documents: Sequence[Document]) -> Perplexity:
        """How well the model predicts these documents, sentence by sentence."""
        corpus, scores = self._score(documents, "sentence", None)
        return text_perplexity(documents, corpus, scores)

    def score(
        self,
        text: str | Sequence[Document],
        *,
        context: str = "sentence",
        whitespace_correction: bool = False,
    ) -> list[WordScore]:
        """Surprisal of every word and sentence end; see `fusion_model.FusionLM.score`.

        Raises:
            FusionLMError: as there; or the model was exported without its encoder.
        """
        check_context(context)
        documents = [Document("text", split_sentences(text))] if isinstance(text, str) else text
        boundary = boundary_ids(self.tokenizer) if whitespace_correction else None
        _, scores = self._score(documents, context, boundary)
        return word_scores(self.tokenizer, documents, scores)

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | None = None,
        prefix_embeds: np.ndarray | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> list[str]:
        """Continuations, which include their prompt, `num_return_sequences` for each.

        Args:
            prompt: one or several, which then run together; each may be empty.
            seed: for sampling. Samples differ from PyTorch's of the same seed.
            prefix_embeds: one vector [E] instead of the prefixes' own embeddings.
            streamer: as in transformers, for one prompt without beams.
            **options: see `fusion_model.export.runtime.generation.GenerationOptions`.

        Raises:
            FusionLMError: an option that is unknown or makes no sense; a model whose view sees
                the future; an embedding of the wrong width; no encoder.
        """
        chosen = GenerationOptions.parse(options)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if streamer is not None and (len(prompts), chosen.num_beams) != (1, 1):
            raise ExportError("a streamer follows one row: give one prompt and no beams")
        rows = [[self.tokenizer.bos_token_id or 0, *self._ids(p)] for p in prompts]
        steps = self.steps(prefix_embeds)
        if streamer is not None:
            streamer.put(np.array(rows[0]))
        out = generate_rows(
            steps,
            rows,
            chosen,
            self.tokenizer.eos_token_id,
            np.random.default_rng(seed),
            None if streamer is None else lambda tokens: streamer.put(np.array(tokens)),
        )
        if streamer is not None:
            streamer.end()
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in out]

    def _ids(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(" ".join(prompt.split()), add_special_tokens=False)[
            "input_ids"
        ]
        return ids

    def steps(self, vector: np.ndarray | None) -> Steps:
        """Generation's inner loop, for a loop of one's own.

        Args:
            vector: [E], instead of the prefixes' own embeddings.
        """
        if self._step_session is None:
            self._step_session = self._open(STEP)
        if self.model["fusion"] == "none":
            return Steps(self._step_session, self.model, self.device, None)
        if vector is not None:
            e = np.asarray(vector, dtype=np.float32)
            if e.shape != (self.model["prefix_size"],):
                raise ExportError(
                    f"prefix_embeds has shape {list(e.shape)}: expected "
                    f"{[self.model['prefix_size']]}, one vector"
                )

            def one(rows: Sequence[Sequence[int]], last: int) -> np.ndarray:
                return np.tile(e, (len(rows), last, 1))

            return Steps(self._step_session, self.model, self.device, one, one_vector=True)
        check_causal(self.planner)
        if self._cache is None:
            assert self.planner is not None
            self._cache = PrefixStream(self.planner)
        cache = self._cache

        def of_prefixes(rows: Sequence[Sequence[int]], last: int) -> np.ndarray:
            return np.stack(cache.of_rows(rows, -last)).reshape(len(rows), last, -1)

        return Steps(self._step_session, self.model, self.device, of_prefixes)
