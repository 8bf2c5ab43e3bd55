"""Scoring and generation with a saved model, on real text, encoder included.

Each is compared with what a user would write plainly: transformers' encoder, `nn.LSTM`, the next
token's scores; `eager` one call a prefix and a sentence, `batched` in padded batches, `published`
with every prefix a row of its own that the LSTM reads from its start. Those see exact embeddings;
ours also those of other policies.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from fusion_model.benchmarks.measure.counts import SIZE, Counts, lstm, matmul
from fusion_model.benchmarks.profile.engines import endless
from fusion_model.benchmarks.suite.cases import EAGER, Case
from fusion_model.benchmarks.suite.encoding import PlainEncoder, of_encoder, tokens_read
from fusion_model.benchmarks.suite.work import (
    Context,
    Unavailable,
    Work,
    check_backend,
)
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fusion_model.config import EARLY, LATE
from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document
from fusion_model.encoders.pretrained import HFEncoder
from fusion_model.errors import FusionLMError
from fusion_model.language_model import FusionLM
from fusion_model.loading import load, load_model
from fusion_model.surprisal import SentenceScores, word_scores

PLAIN = (EAGER, "batched", "published")
PREFIXES = 32  # of a batch
NEVER = 1e4  # taken from the score of the sentence's end, so that a text gets its length


class Plain:
    """A model's own modules, called plainly.

    Raises:
        Unavailable: not one layer and late fusion.
    """

    def __init__(self, lm: FusionLM, way: str) -> None:
        self.lm, self.model, self.way = lm, lm.model, way
        config, self.encoder = lm.model.config, None
        if config.fusion not in (*LATE, "none") or config.num_layers > 1:
            raise Unavailable(f"written for one layer and late fusion, not {config.fusion}")
        if lm.planner is not None and isinstance(lm.planner.encoder, HFEncoder):
            self.encoder = PlainEncoder(lm.planner.encoder, 1 + (PREFIXES - 1) * (way == "batched"))

    def vectors(self, rows: Sequence[Sequence[int]], start: int) -> list[Tensor | None]:
        """Embeddings of the prefixes from `start` on of each row, [n, E] each; of each one once."""
        if self.lm.planner is None or self.encoder is None:
            return [None] * len(rows)
        wanted = [self.lm.planner.last_inputs(row, start) for row in rows]
        distinct = list(dict.fromkeys(i for inputs in wanted for i in inputs))
        found = dict(zip(distinct, self.encoder(distinct), strict=True))
        return [torch.stack([found[i] for i in inputs]).to(self.model.dtype) for inputs in wanted]

    def features(self, ids: Tensor, e: Tensor | None) -> Tensor:
        """What the vocabulary is multiplied with, of ids [B, T] and e [B, T, E]; [B, T, D]."""
        x = self.model.embed_tokens(ids)
        if self.way == "published":  # a row a prefix, padded to the sentence
            steps = torch.arange(x.shape[1], device=x.device)
            hidden = self.model.lstm(x.expand(x.shape[1], -1, -1))[0][steps, steps][None]
        else:
            hidden, _ = self.model.lstm(x)
        return self._fused(hidden, e)

    def _fused(self, hidden: Tensor, e: Tensor | None) -> Tensor:
        features: Tensor = self.model._project(hidden, e)
        return features

    def score(self, sentences: Sequence[Sequence[int]]) -> list[SentenceScores]:
        """Surprisals in nats of all tokens of each sentence."""
        device, all_at_once = self.model.device, self.way == "batched"
        groups = [sentences] if all_at_once else [[sentence] for sentence in sentences]
        found = []
        for group in groups:
            rows = [torch.tensor(row, device=device) for row in group]
            vectors = self.vectors([row[:-1] for row in group], 0)
            e = None if vectors[0] is None else pad_sequence(vectors, True)  # type: ignore[arg-type]
            features = self.features(pad_sequence(rows, True)[:, :-1], e)
            real = torch.cat([f[: len(row) - 1] for f, row in zip(features, rows, strict=True)])
            log_probs = self.model.lm_head(real).float().log_softmax(-1)
            nats = -log_probs.gather(1, torch.cat([row[1:] for row in rows])[:, None])[:, 0]
            lengths = [len(row) - 1 for row in rows]
            found += [SentenceScores(part.cpu().numpy()) for part in nats.split(lengths)]
        return found

    def generate(self, row: list[int], count: int) -> list[int]:
        """The likeliest continuation; the LSTM's state is kept unless it starts anew."""
        row, state = list(row), None
        for _ in range(count):
            new = row if self.way == "published" or state is None else row[-1:]
            x = self.model.embed_tokens(torch.tensor([new], device=self.model.device))
            hidden, state = self.model.lstm(x, None if self.way == "published" else state)
            (e,) = self.vectors([row], -1)
            scores = self.model.lm_head(self._fused(hidden[:, -1:], None if e is None else e[None]))
            row.append(int(scores[0, -1].argmax()))
        return row


def _name(case: Case, context: Context) -> str:
    return context.model + "-unfused" * (case.variant == "unfused")


def _policy(case: Case, context: Context) -> str | None:
    """The policy in place of the model's own."""
    fused = context.once("fused", lambda: load_model(context.model)[0].config.fusion != "none")
    if case.way in PLAIN and fused:
        return "every"
    return case.variant if case.variant not in ("", "unfused") else None


def _facts(case: Case, lm: FusionLM) -> dict[str, Any]:
    """The policy, where the backend's name does not say it."""
    return {} if lm.planner is None or case.variant else {"policy": lm.planner.encoder.policy}


def _model(case: Case, context: Context, **changed: Any) -> FusionLM:
    """The model of a case; `changed` are options of `load`."""
    options: dict[str, Any] = {"dtype": case.dtype, "encoder_dtype": case.dtype}
    options |= {"device": context.device, "policy": _policy(case, context)} | changed
    name = _name(case, context)
    return context.once((name, *options.values()), lambda: load(name, **options))


def _exact(case: Case, context: Context) -> FusionLM:
    """The reference: float32, the plain equations, nothing kept of earlier prefixes."""
    lm = _model(case, context, dtype="float32", encoder_dtype="float32", backend="reference")
    return FusionLM(lm.model, lm.tokenizer, lm.planner)


def _exported(case: Case, context: Context) -> Any:
    """The model through ONNX Runtime, exported once."""
    precision = {"onnx": "fp32", "onnx-int8": "int8"}[case.way]

    def make() -> Any:
        try:
            import onnxruntime  # noqa: F401
            from fusion_model.export import OnnxFusionLM, export_model

            lm = load(_name(case, context), policy=_policy(case, context))
            if lm.planner is not None:
                lm.model.config.policy = lm.planner.encoder.policy
            folder = context.scratch / f"{precision}-{case.variant or 'own'}"
            export_model(lm, folder, encoder=lm.planner is not None, precision=precision)
            return OnnxFusionLM(folder, device=context.device, threads=torch.get_num_threads())
        except ImportError as error:
            raise Unavailable(f"{error.name} is not installed: the extra [onnx]") from None
        except FusionLMError as error:
            raise Unavailable(str(error)) from None

    return context.once(f"{case.way} {case.variant}", make)


def _ready(case: Case, context: Context) -> Callable[[], Any]:
    """What gives the case's model with nothing kept of earlier prefixes."""
    if case.way.startswith("onnx"):
        exported = _exported(case, context)

        def forgetful() -> Any:
            exported.__dict__.pop("stream", None)
            return exported

        return forgetful
    check_backend(case.way, context.device)
    lm = _model(case, context)

    def ours() -> FusionLM:
        lm.model.set_backend(case.way)
        return FusionLM(lm.model, lm.tokenizer, lm.planner)

    return ours


def counts(case: Case, lm: FusionLM, rows: Sequence[Sequence[int]], calls: int) -> Counts:
    """Of the whole model reading the tokens of rows but for the last, with distinct prefixes.

    Args:
        calls: how often all weights are read at least (once a token when generating).
    """
    dtype = "int8" if case.way == "onnx-int8" else case.dtype
    config, size = lm.model.config, SIZE[dtype]
    lengths = [len(row) - 1 for row in rows]
    tokens = sum(lengths)
    total = lstm(1, tokens, config.embedding_size, config.hidden_size, size)
    if config.fusion in EARLY:  # every prefix is a recurrence of its own
        more = sum(n * (n - 1) / 2 for n in lengths)
        total += Counts(8.0 * more * config.hidden_size**2, 0.0)
    last = calls if calls > 1 else tokens  # of a prompt the last position alone is asked for
    total += matmul(last, lm.model.projection.in_features, config.embedding_size, size)
    total += matmul(last, config.embedding_size, config.vocab_size, size)
    own = float(sum(p.numel() for p in lm.model.parameters()) * size)
    total += Counts(0.0, own * (calls - 1), 0.0)
    if lm.planner is not None and isinstance(lm.planner.encoder, HFEncoder):
        start, of_row = -calls if calls > 1 else 0, lm.planner.last_inputs
        inputs = {given for row in rows for given in of_row(row[:-1], start)}
        read = tokens_read(lm.planner.policy.name, inputs)
        total += of_encoder(lm.planner.encoder, dtype, read, calls)
    return total


def _is_exact(case: Case) -> bool:
    return case.dtype == "float32" and case.way != "onnx-int8"


def scoring(case: Case, context: Context) -> Work:
    """Surprisal of every word, from the text itself."""
    lm = _model(case, context)
    documents = [Document("text", context.sentences)]
    if case.way in PLAIN:
        plain = Plain(lm, case.way)

        def score() -> Any:
            sentences = Corpus.from_documents(documents, lm.tokenizer).sentences
            return word_scores(lm.tokenizer, documents, plain.score(sentences))
    else:
        ready = _ready(case, context)

        def score() -> Any:
            return ready().score(documents)

    def nats(words: Any) -> Tensor:
        return torch.tensor([word.nats for word in words])

    def expected() -> Tensor:
        return nats(_exact(case, context).score(documents))

    sentences = Corpus.from_documents(documents, lm.tokenizer).sentences
    run = torch.inference_mode()(score)
    return Work(
        run,
        lambda: nats(run()),
        lambda: context.once((case.group, _policy(case, context), case.variant), expected),
        items=sum(len(s) - 1 for s in sentences),
        counts=counts(case, lm, sentences, 1),
        tolerance=1e-3 if _is_exact(case) else 0.15,
        facts=_facts(case, lm),
    )


def generation(case: Case, context: Context) -> Work:
    """`context.new_tokens` tokens after half of the longest sentence: its end is never chosen."""
    lm = _model(case, context)
    words = max((s.split() for s in context.sentences), key=len)
    prompt, count = " ".join(words[: max(1, len(words) // 2)]), context.new_tokens
    row, end = lm.prompt_row(prompt), lm.tokenizer.eos_token_id
    exact = _exact(case, context)
    for model in (lm.model, exact.model):
        if model.lm_head.bias[end] > -NEVER / 2:
            model.lm_head.bias.data[end] -= NEVER
    options = {"max_new_tokens": count, "do_sample": False}
    if case.way in PLAIN:
        plain = Plain(lm, case.way)

        def made() -> str:
            return _text(lm, plain.generate(row, count))
    elif case.way.startswith("onnx"):
        from fusion_model.export.runtime import generation as runtime

        ready = _ready(case, context)

        def made() -> str:
            with endless(runtime, end):
                return str(ready().generate(prompt, **options)[0])
    else:
        ready = _ready(case, context)

        def made() -> str:
            return str(ready().generate(prompt, **options)[0])

    run = torch.inference_mode()(made)

    def ids_of(text: str) -> Tensor:
        """Of an exact backend the tokens themselves; of another, how likely its text is."""
        if _is_exact(case):
            return torch.tensor([float(i) for i in lm.tokenizer(text)["input_ids"]])
        scored = exact.score([Document("made", [text])])[:-1]  # but for its end
        return torch.tensor([np.mean([word.nats for word in scored])])

    def greedy() -> list[int]:
        ids = torch.tensor([row], device=exact.model.device)
        out = exact.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return [int(i) for i in out[0]]

    whole = context.once((case.group, _policy(case, context), case.variant), greedy)
    return Work(
        run,
        lambda: ids_of(run()),
        lambda: ids_of(_text(exact, whole)),
        items=count,
        counts=counts(case, lm, [whole], count),
        tolerance=0.0 if _is_exact(case) else 0.25,
        facts=_facts(case, lm),
    )


def _text(lm: FusionLM, row: Sequence[int]) -> str:
    return str(lm.tokenizer.decode(list(row), skip_special_tokens=True))
