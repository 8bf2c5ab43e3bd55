"""An exported model: `score`, `perplexity` and `generate` without PyTorch."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from fusion_model.export.manifest import SEQUENCE, STEP, TOKENIZER, read_manifest
from fusion_model.export.runtime.encoder import OnnxEncoder
from fusion_model.export.runtime.generation import GenerationOptions, generate_rows
from fusion_model.export.runtime.sequences import Sequences
from fusion_model.export.runtime.session import (
    check_version,
    choose_device,
    default_threads,
    open_session,
    runtime,
)
from fusion_model.export.runtime.steps import Steps
from fusion_model.export.runtime.tokenizer import TextTokenizer
from fusion_model.export.runtime.trees import TreeEncoder

from fusion_model.encoders import TextEncoder
from fusion_model.encoders.controls import BagEncoder, ZeroEncoder
from fusion_model.errors import ExportError
from fusion_model.prefixes.planner import PrefixPlanner, check_causal
from fusion_model.prefixes.stream import PrefixStream
from fusion_model.scoring import Array, LogProbs, TextModel


class OnnxFusionLM(TextModel):
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
            old; the device is not there, or not for int8.
    """

    tokens_per_batch = 2048

    def __init__(
        self, folder: str | Path, *, device: str = "auto", threads: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self.threads = default_threads() if threads is None else threads
        self.manifest = read_manifest(self.folder)
        check_version(runtime().__version__, self.manifest["oldest_onnxruntime"])
        self.device = choose_device(device, self.manifest["precision"], self.folder / SEQUENCE)
        self.model: dict[str, Any] = self.manifest["model"]
        described = self.manifest["tokenizer"]
        self.tokenizer = TextTokenizer(self.folder / TOKENIZER, described)
        self.shuffle = self.model["shuffle"]
        self._sequences = Sequences(self._open(SEQUENCE), self.model)
        if self.device != "cpu" and "probe" in self.manifest["verified"]:
            self._sequences.check_probe(self.manifest["verified"]["probe"])

    def _open(self, name: str) -> Any:
        return open_session(self.folder / name, self.device, self.threads)

    @cached_property
    def _step_session(self) -> Any:
        return self._open(STEP)

    @cached_property
    def planner(self) -> PrefixPlanner | None:  # type: ignore[override]
        """Prefixes to encoder; None for an unfused model. The encoder is opened when asked for.

        Raises:
            ExportError: the model was exported without its encoder.
        """
        if self.model["fusion"] == "none":
            return None
        encoder = open_encoder(self.folder, self.manifest, self.device, self.threads)
        view, shares = self.model["view"], self.model["shares_vocabulary"]
        return PrefixPlanner(encoder, self.tokenizer, view, shares)

    @cached_property
    def stream(self) -> PrefixStream:
        """Embeddings of the prefixes that generation makes.

        Raises:
            FusionLMError: a view that sees the future; see also `planner`.
        """
        check_causal(self.planner)
        assert self.planner is not None
        return PrefixStream(self.planner)

    def log_probs(
        self, ids: Array, targets: Array, e: Array | None, boundary: Array | None, state: Any
    ) -> LogProbs:
        """See `TextModel`.

        Raises:
            ExportError: ids or embeddings of the wrong width, shape or type.
        """
        one = np.zeros(1, dtype=np.int64)  # the graph always wants some
        some = one if boundary is None else boundary
        target, edge, state = self._sequences.run(ids, np.maximum(targets, 0), e, some, state)
        asked = targets >= 0
        return target[asked], None if boundary is None else edge[asked], state

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
        ids = np.asarray(input_ids)
        ends = ids.shape[-1] if lengths is None else np.asarray(lengths)[:, None]
        real = np.arange(ids.shape[-1]) < ends
        self._sequences.check_ids(np.where(real, ids, 0))  # the last ones, too, which are targets
        e = None if prefix_embeds is None else np.asarray(prefix_embeds)
        if e is not None and e.ndim == 2:
            e = np.repeat(e[:, None], ids.shape[-1] - 1, axis=1)
        targets = np.where(real, ids, -1)[:, 1:]
        return self.log_probs(ids[:, :-1].astype(np.int64), targets, e, None, None)[0]

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
        if not prompts:
            return []
        if streamer is not None and (len(prompts), chosen.num_beams) != (1, 1):
            raise ExportError("a streamer follows one row: give one prompt and no beams")
        rows = [self.prompt_row(p) for p in prompts]
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

    def steps(self, vector: np.ndarray | None) -> Steps:
        """Generation's inner loop, for a loop of one's own.

        Args:
            vector: [E], instead of the prefixes' own embeddings.
        """
        session, device = self._step_session, self.device
        if self.model["fusion"] == "none":
            return Steps(session, self.model, device, None)
        if vector is None:
            stream = self.stream

            def of_prefixes(rows: Sequence[Sequence[int]], last: int) -> np.ndarray:
                return np.stack(stream.of_rows(rows, -last)).reshape(len(rows), last, -1)

            return Steps(session, self.model, device, of_prefixes)
        e = np.asarray(vector, dtype=np.float32)
        if e.shape != (self.model["prefix_size"],):
            raise ExportError(
                f"prefix_embeds has shape {list(e.shape)}: expected "
                f"{[self.model['prefix_size']]}, one vector"
            )

        def one(rows: Sequence[Sequence[int]], last: int) -> np.ndarray:
            return np.tile(e, (len(rows), last, 1))

        return Steps(session, self.model, device, one, one_vector=True)


def open_encoder(folder: Path, manifest: dict[str, Any], device: str, threads: int) -> TextEncoder:
    """The encoder of an export.

    Raises:
        ExportError: the model was exported without it.
    """
    described, name = manifest["encoder"], manifest["model"].get("encoder")
    if described is None:
        raise ExportError(
            f"{folder} was exported without its encoder ({name}): export again with --encoder, or "
            "pass prefix embeddings to token_log_probs"
        )
    policy = described.get("policy", "every")
    if described["kind"] == "zeros":
        return ZeroEncoder(described["dim"], policy)
    if described["kind"] == "bag":
        return BagEncoder.load(name, folder, policy)
    kind = TreeEncoder if described["kind"] == "trees" else OnnxEncoder
    return kind(folder, described, device, threads)
