"""A model, in PyTorch or exported, as a profile drives it: its stages, and a tick a token."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fusion_model.benchmarks.profile.spans import Recorder, replaced

from fusion_model.data import corpus
from fusion_model.data.text import Document
from fusion_model.encoders.incremental.stream import Stream
from fusion_model.prefixes.stream import PrefixStream

TOKENISER, ENCODER, LSTM = "tokeniser", "prefix encoding", "LSTM and fusion"
VOCABULARY, HOST = "vocabulary and sampling", "host"
PARTS = (TOKENISER, ENCODER, LSTM, VOCABULARY, HOST)
Tick = Callable[[], None]


def _planner_stages(planner: Any) -> list[tuple[Any, str, str]]:
    found: list[tuple[Any, str, str]] = [(corpus, "encode_sentences", TOKENISER)]
    if planner is not None:
        found += [(planner, "inputs", TOKENISER), (PrefixStream, "inputs_of", TOKENISER)]
        found += [(planner.encoder, "encode", ENCODER), (Stream, "encode", ENCODER)]
    return found


@contextmanager
def endless(module: Any, end: int) -> Iterator[None]:
    """`module.choose` never takes token `end` meanwhile: after it, nothing new would be read."""
    choose = module.choose

    def other(scores: Any, *rest: Any) -> Any:
        scores[:, end] = -1e30
        return choose(scores, *rest)

    with replaced(module, "choose", other):
        yield


class _Ticker:
    """Stands where transformers puts a streamer: called with the prompt, then with each token."""

    def __init__(self, tick: Tick) -> None:
        self._tick, self._prompt = tick, True

    def put(self, value: Any) -> None:
        if not self._prompt:
            self._tick()
        self._prompt = False

    def end(self) -> None:
        """Nothing is kept back."""


class TorchEngine:
    """A `FusionLM`; each call starts with nothing kept of earlier prefixes."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm

    def generate(self, prompts: Sequence[str], tokens: int, tick: Tick) -> None:
        """Make `tokens` tokens after each prompt, greedily; `tick` after each."""
        import torch

        from fusion_model import decoding

        model, end = self.lm.model, self.lm.tokenizer.eos_token_id
        type(self.lm)(model, self.lm.tokenizer, self.lm.planner)  # attaches a new cache
        rows = [self.lm.prompt_ids(p) for p in prompts]
        length = min(r.shape[1] for r in rows)  # rows of one length need no padding
        ids = torch.cat([r[:, :length] for r in rows])
        never = replaced(model.generation_config, "eos_token_id", None)
        with never, endless(decoding, end):
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                streamer=_Ticker(tick),
            )

    def forget(self) -> None:
        """Before each call: the encoder keeps the latest texts' vectors, too."""
        encoder: Any = getattr(self.lm.planner, "encoder", None)
        if hasattr(encoder, "forget"):
            encoder.forget()

    def stages(self, recorder: Recorder) -> AbstractContextManager[None]:
        """Spans around the stages while the block runs."""
        from fusion_model import decoding
        from fusion_model.attached import PrefixCache

        model = self.lm.model
        return recorder.around(
            *_planner_stages(self.lm.planner),
            (self.lm, "prompt_ids", TOKENISER),
            (PrefixCache, "__call__", ENCODER),
            (model, "features", LSTM),
            (self.lm, "log_probs", VOCABULARY),
            (model.lm_head, "forward", VOCABULARY),
            (decoding, "choose", VOCABULARY),
        )


class OnnxEngine:
    """An `OnnxFusionLM`. Its step is one graph: under the clock, the vocabulary is counted with
    the LSTM; `vocabulary_shares` tells them apart."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm

    def forget(self) -> None:
        """Nothing is kept from call to call."""

    def generate(self, prompts: Sequence[str], tokens: int, tick: Tick) -> None:
        from fusion_model.export.runtime import generation

        self.lm.__dict__.pop("stream", None)  # nothing kept of earlier prefixes
        choose, end = generation.choose, self.lm.tokenizer.eos_token_id

        def choose_then_tick(*args: Any) -> list[int]:
            chosen = choose(*args)
            tick()
            return chosen

        with replaced(generation, "choose", choose_then_tick), endless(generation, end):
            self.lm.generate(list(prompts), max_new_tokens=tokens)

    @contextmanager
    def stages(self, recorder: Recorder) -> Iterator[None]:
        from fusion_model.export.runtime import generation

        make_steps = self.lm.steps

        def steps(vector: Any) -> Any:
            made = make_steps(vector)
            made.start = recorder.spanned(made.start, LSTM)
            made.advance = recorder.spanned(made.advance, LSTM)
            return made

        with (
            replaced(self.lm, "steps", steps),
            recorder.around(
                *_planner_stages(self.lm.planner),
                (self.lm, "prompt_row", TOKENISER),
                (self.lm._sequences, "run", LSTM),
                (generation, "choose", VOCABULARY),
            ),
        ):
            yield

    def vocabulary_shares(
        self, prompts: Sequence[str], sentences: Sequence[str]
    ) -> tuple[float, float]:
        """What the vocabulary takes of the step graph's time and of the sequence graph's, by ONNX
        Runtime's own clock, which knows kernels on a CPU alone."""
        from fusion_model.export.manifest import SEQUENCE, STEP
        from fusion_model.export.runtime.session import open_session

        lm = self.lm
        with TemporaryDirectory() as folder:
            step, sequence = (
                open_session(lm.folder / name, lm.device, lm.threads, Path(folder) / name)
                for name in (STEP, SEQUENCE)
            )
            with replaced(lm, "_step_session", step), replaced(lm._sequences, "_session", sequence):
                self.generate(prompts, 8, lambda: None)
                lm.score([Document("text", list(sentences))])
            size = lm.model["vocab_size"]
            return _share(step.end_profiling(), size), _share(sequence.end_profiling(), size)


Engine = TorchEngine | OnnxEngine


def _share(events: str, size: int) -> float:
    """Of all nodes' time, that of nodes with a value whose last axis is `size`."""
    whole = own = 0
    for event in json.loads(Path(events).read_text()):
        shapes = event.get("args", {})
        if "output_type_shape" not in shapes or ".step." in event["name"]:  # a Scan has it too
            continue
        values = [*shapes["input_type_shape"], *shapes["output_type_shape"]]
        dims = [dim for value in values for dim in value.values()]
        whole += event["dur"]
        own += event["dur"] if any(dim[-1:] == [size] for dim in dims) else 0
    return own / max(whole, 1)
