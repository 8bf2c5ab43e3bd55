"""Prefix embeddings from text: plainly by transformers, by sentence-transformers, and ours.

The prefixes are those of the model's tokens; all-MiniLM-L6-v2, mean of tokens where no pooling is
named. A prefix that stands twice counts once, and the others are given it once, so that no way
gains by dropping what another one computes again.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from fusion_model.benchmarks.measure.counts import SIZE, Counts
from fusion_model.benchmarks.suite.cases import EAGER, Case
from fusion_model.benchmarks.suite.work import TOLERANCE, Context, Unavailable, Work
from torch import Tensor, nn

from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document
from fusion_model.encoders import load_encoder
from fusion_model.encoders.inputs import EncoderInput
from fusion_model.encoders.pretrained import HFEncoder, counted_tokens
from fusion_model.encoders.sources import minilm_path
from fusion_model.errors import EncoderError
from fusion_model.loading import load_model
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.prefixes.stream import PrefixStream
from fusion_model.prefixes.views import prefix_texts

WIDTH = 384  # of MiniLM
ELSEWHERE = "SENTENCE_TRANSFORMERS_ONNX"  # its libraries do not go with ours
ONE_IN = 5  # prefixes that are encoded where each is one call, and those that are checked
Encode = Callable[[Sequence[str]], Any]


def corpus_of(context: Context) -> tuple[Any, Corpus]:
    """The model's tokenizer, and the text by it."""
    tokenizer = context.once("tokenizer", lambda: load_model(context.model)[1])
    return tokenizer, Corpus.from_documents([Document("text", context.sentences)], tokenizer)


class PlainEncoder:
    """transformers' encoder as its users call it: padded batches of similar lengths; of its layers
    only those below what is read."""

    def __init__(self, encoder: HFEncoder, size: int) -> None:
        self.encoder, self.size = encoder, size
        if {p.name for p in encoder.poolings} - {"cls", "last", "mean", "sep", "static"}:
            raise Unavailable(f"plain PyTorch is not written for pooling {encoder.pooling}")

    @torch.inference_mode()
    def __call__(self, inputs: Sequence[EncoderInput]) -> Tensor:
        """Vectors [N, E], float32 on the device, of exact inputs."""
        network: Any = self.encoder.model
        out = [torch.empty(0)] * len(inputs)
        rows = [np.frombuffer(i.ids, dtype="<i4") for i in inputs]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        with self._only_what_is_read() as hidden:
            for start in range(0, len(rows), self.size):
                places = order[start : start + self.size]
                ids = np.zeros((len(places), len(rows[places[-1]])), dtype=np.int64)
                for row, place in zip(ids, places, strict=True):
                    row[: len(rows[place])] = rows[place]
                ends = torch.tensor([[len(rows[place])] for place in places])
                real = (torch.arange(ids.shape[1]) < ends).long().to(network.device)
                mask = real if len(places) > 1 else None
                network(input_ids=torch.from_numpy(ids).to(network.device), attention_mask=mask)
                for i, place in enumerate(places):
                    own = {n: h[i, : len(rows[place])] for n, h in hidden.items()}
                    out[place] = self._pooled(rows[place], own)
        return torch.stack(out).float()

    @contextmanager
    def _only_what_is_read(self) -> Iterator[dict[int, Tensor]]:
        """The layers above are out meanwhile; by its number, what each layer that is read gave."""
        layers, hidden = layers_of(self.encoder), dict[int, Tensor]()

        def keep(number: int, layer: Any, given: Any, gave: Any) -> None:
            hidden[number] = gave[0] if isinstance(gave, tuple) else gave

        with ExitStack() as ending:
            for number in {p.layer for p in self.encoder.read}:
                handle = layers[number - 1].register_forward_hook(partial(keep, number))
                ending.callback(handle.remove)
            lower = dict(list(layers._modules.items())[: self.encoder.deepest])
            ending.enter_context(patch.object(layers, "_modules", lower))
            yield hidden

    def _pooled(self, ids: np.ndarray, hidden: dict[int, Tensor]) -> Tensor:
        """Of one text, ids [n], and what layers gave, [n, E] each."""
        last, parts, read = len(ids) - self.encoder.after - 1, [], iter(self.encoder.read)
        for p in self.encoder.poolings:
            if p.name == "static":
                table = self.encoder.model.get_input_embeddings().weight
                parts.append(table[int(ids[max(last, 0)])])
                continue
            vectors = hidden[next(read).layer]
            at = {"cls": 0, "last": last, "sep": last + 1}
            parts.append(vectors.mean(0) if p.name == "mean" else vectors[at[p.name]])
        return torch.cat(parts)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """As called, of texts."""
        return self(self.encoder.inputs_from_texts(texts))


def _sentence_transformers(case: Case, context: Context) -> Encode:
    """Their `encode`, without its normalisation."""
    try:
        import sentence_transformers as library
    except ImportError:
        raise Unavailable("sentence-transformers is not installed: the extra [bench]") from None
    whole = library.SentenceTransformer(str(minilm_path()), device=context.device)
    modules = list(whole.children())[:2]  # transformer and pooling
    model = library.SentenceTransformer(modules=modules, device=context.device)
    model.max_seq_length = 512
    model = model.to(getattr(torch, case.dtype))
    options: Any = {"convert_to_tensor": True, "show_progress_bar": False}
    return lambda texts: model.encode(list(texts), batch_size=int(case.variant), **options).float()


def _onnx_elsewhere(case: Case, context: Context) -> Encode:
    """sentence-transformers' ONNX backend, in the Python that `ELSEWHERE` names."""
    python = os.environ.get(ELSEWHERE)
    if python is None or case.dtype != "float32" or context.device != "cpu":
        raise Unavailable(
            f"float32 on a CPU, by the Python that {ELSEWHERE} names: docs/encodings.md"
        )
    script, threads = Path(__file__).with_name("worker.py"), str(torch.get_num_threads())
    worker = subprocess.Popen(
        [python, script, minilm_path(), case.variant],
        env=os.environ | {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    context.closing.callback(worker.terminate)

    def encode(texts: Sequence[str]) -> Tensor:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(list(texts)).encode() + b"\n")
        worker.stdin.flush()
        found = bytearray(worker.stdout.read(4 * WIDTH * len(texts)))
        if not found:
            raise Unavailable(f"sentence-transformers' ONNX backend does not run in {python}")
        return torch.frombuffer(found, dtype=torch.float32).view(-1, WIDTH)

    return encode


def layers_of(encoder: HFEncoder) -> nn.ModuleList:
    """The network's list of layers.

    Raises:
        Unavailable: it has none.
    """
    for module in encoder.model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == encoder.depth:
            return module
    raise Unavailable(f"written for encoders with a list of layers, not for {encoder.name}")


def of_encoder(encoder: HFEncoder, dtype: str, tokens: float, calls: int) -> Counts:
    """Of reading `tokens` tokens in `calls` calls: the weights of the layers that are read."""
    layers = layers_of(encoder)[: encoder.deepest]
    weights = sum(p.numel() for p in layers.parameters())
    held = float(weights * SIZE[dtype])
    return Counts(2.0 * weights * tokens, held * calls, held)


def tokens_read(policy: str, inputs: set[EncoderInput]) -> int:
    """That nothing can save: under `every` all; with keys and values kept one a prefix; a vector
    that is held costs, at best, nothing."""
    of_policy = {"every": sum(len(i.ids) // 4 for i in inputs), "incremental": len(inputs)}
    return of_policy.get(policy, 0)


def _planned(case: Case, context: Context) -> tuple[PrefixPlanner, HFEncoder]:
    """Ours, and the same encoder in float32: policy and pooling are the backend's variant.

    Raises:
        Unavailable: the encoder is not installed.
    """
    policy, _, pooling = (case.variant if case.way == "fusion-lm" else "every").partition(" ")
    tokenizer, _ = corpus_of(context)

    def make(dtype: str) -> HFEncoder:
        options: Any = {"dtype": dtype, "device": context.device, "policy": policy}
        try:
            found = load_encoder("minilm", pooling or "mean", **options)
        except EncoderError as error:
            raise Unavailable(str(error)) from None
        assert isinstance(found, HFEncoder)
        return found

    ours, exact = (
        context.once((policy, pooling, dtype), partial(make, dtype))
        for dtype in (case.dtype, "float32")
    )
    return PrefixPlanner(ours, tokenizer), exact


def embedding(case: Case, context: Context) -> Work:
    """All prefixes of the text, none kept from earlier."""
    tokenizer, corpus = corpus_of(context)
    all_texts = [t.strip() for s in corpus.sentences for t in prefix_texts(tokenizer, s[1:-1])]
    first = {text: i for i, text in reversed(list(enumerate(all_texts)))}
    texts = sorted(first, key=first.__getitem__)
    planner, exact = _planned(case, context)
    encoder: Any = planner.encoder
    sentences, previous = corpus.sentences, [(), *corpus.sentences[:-1]]
    inputs = planner.inputs(sentences, previous)
    few = slice(None, None, ONE_IN)
    facts: dict[str, Any] = {"exact": encoder.policy == "every"}

    def ours() -> Tensor:
        encoder._pieces.clear()  # words that were tokenised before
        found: Tensor = encoder.encode(planner.inputs(sentences, previous))
        return found

    def counted() -> Tensor:
        with counted_tokens(encoder) as sizes:
            found = ours()
        facts["tokens_per_prefix"] = round(sum(sizes) / len(texts), 3)
        return found[[first[text] for text in texts[few]]]

    def expected() -> Tensor:
        """A call a prefix, by transformers; of an approximate policy by our own encoder."""
        if facts["exact"]:
            plain = PlainEncoder(exact, 1)
            return context.once((case.group, "expected"), lambda: plain.texts(texts[few]))
        return torch.cat([exact.encode([inputs[first[text]]]) for text in texts[few]])

    run: Callable[[], Any] = ours
    result: Callable[[], Tensor] = counted
    if case.way == EAGER:
        run = result = partial(PlainEncoder(encoder, 1).texts, texts[few])
    elif case.way != "fusion-lm":
        theirs = {"sentence-transformers": _sentence_transformers}.get(case.way, _onnx_elsewhere)
        encode = theirs(case, context)
        run = partial(encode, texts)
        result = lambda: run()[few]  # noqa: E731
    read = tokens_read(planner.policy.name, {inputs[first[t]] for t in texts})
    count = len(texts[few]) if case.way == EAGER else len(texts)
    share = count / len(texts)
    return Work(
        run,
        result,
        expected,
        items=count,
        counts=of_encoder(exact, case.dtype, share * read, 1),
        tolerance=1e-4 if case.dtype == "float32" else 0.1,
        facts=facts,
    )


def streaming(case: Case, context: Context) -> Work:
    """One text that grows by a token a call, as in generation."""
    tokenizer, corpus = corpus_of(context)
    ids = [tokenizer.bos_token_id, *(t for s in corpus.sentences for t in s[1:-1])][: case.length]
    planner, exact = _planned(case, context)

    def ours() -> Tensor:
        stream = PrefixStream(planner)
        return torch.stack([stream.step([ids[:t]])[0] for t in range(1, len(ids) + 1)])

    def plainly() -> Tensor:
        plain = PlainEncoder(exact, 1)
        prefixes = (planner.last_inputs(ids[:t], -1) for t in range(1, len(ids) + 1))
        return torch.cat([plain(given) for given in prefixes])

    def expected() -> Tensor:
        """Of the whole text at once."""
        return PrefixPlanner(exact, tokenizer).encoder.encode(planner.inputs([ids]))

    inputs = planner.inputs([ids])
    run = torch.inference_mode()(plainly if case.way == EAGER else ours)
    return Work(
        run,
        run,
        expected,
        items=len(ids),
        counts=of_encoder(
            exact, case.dtype, tokens_read(planner.policy.name, set(inputs)), len(ids)
        ),
        tolerance=TOLERANCE[case.dtype],
        facts={"exact": planner.policy.name == "every"},
    )
