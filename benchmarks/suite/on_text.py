"""Prefix embeddings, scoring and generation with a saved model, on real text.

Each is compared with what a user would write plainly: one prefix a call of the encoder, one
sentence a call of nn.LSTM, no batches, nothing kept; `published` also starts the LSTM anew for
every prefix, as the published code does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fusion_model.benchmarks.measure.counts import SIZE, Counts, lstm, matmul
from fusion_model.benchmarks.suite.cases import EAGER, Case
from fusion_model.benchmarks.suite.encoding import WAYS, mean_encoder
from fusion_model.benchmarks.suite.work import (
    Context,
    Unavailable,
    Work,
    check_backend,
    no_gradients,
)
from torch import Tensor

from fusion_model.config import EARLY, LATE
from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document
from fusion_model.encoders.inputs import EncoderInput
from fusion_model.encoders.pretrained import HFEncoder
from fusion_model.errors import FusionLMError
from fusion_model.language_model import FusionLM
from fusion_model.loading import load
from fusion_model.scoring import score_sentences


class Plain:
    """A model's own modules, called plainly."""

    def __init__(self, lm: FusionLM, restart: bool) -> None:
        self.lm, self.model, self.restart = lm, lm.model, restart
        config = lm.model.config
        if config.fusion not in (*LATE, "none") or config.num_layers > 1:
            raise Unavailable(f"written for one layer and late fusion, not {config.fusion}")

    def vectors(self, rows: Sequence[Sequence[int]]) -> Tensor | None:
        """Embeddings of the texts of these tokens, one call of the encoder each, [N, E]."""
        planner = self.lm.planner
        if planner is None:
            return None
        found = []
        for row in rows:
            (*_, given) = planner.inputs([row])
            found.append(torch.as_tensor(planner.encoder.encode([given]))[0])
        return torch.stack(found).to(self.model.device)

    def logits(self, ids: Tensor, e: Tensor | None) -> Tensor:
        """Scores after every token of ids [T], with e [T, E]; [T, V]."""
        x = self.model.embed_tokens(ids[None])
        if self.restart:
            steps = range(1, len(ids) + 1)
            hidden = torch.cat([self.model.lstm(x[:, :end])[0][:, -1:] for end in steps], 1)
        else:
            hidden, _ = self.model.lstm(x)
        return self._scores(hidden, e)

    def _scores(self, hidden: Tensor, e: Tensor | None) -> Tensor:
        """Of hidden states [1, T, H], with e [T, E]; [T, V]."""
        fused = self.model._fuse(hidden, None if e is None else e[None].to(hidden.dtype))
        return self.model.lm_head(self.model.projection(fused))[0]

    def score(self, sentences: Sequence[Sequence[int]]) -> Tensor:
        """Surprisals in nats of all tokens, sentence after sentence."""
        found = []
        for row in sentences:
            ids = torch.tensor(row, device=self.model.device)
            e = self.vectors([row[:t] for t in range(1, len(row))])
            log_probs = self.logits(ids[:-1], e).float().log_softmax(-1)
            found.append(-log_probs.gather(1, ids[1:, None])[:, 0])
        return torch.cat(found)

    def generate(self, row: list[int], count: int) -> list[int]:
        """The likeliest continuation; the LSTM's state is kept unless it starts anew."""
        row, state = list(row), None
        e = self.vectors([row[:t] for t in range(1, len(row) + 1)])
        for _ in range(count):
            new = row if self.restart or state is None else row[-1:]
            x = self.model.embed_tokens(torch.tensor([new], device=self.model.device))
            hidden, state = self.model.lstm(x, None if self.restart else state)
            scores = self._scores(hidden[:, -1:], None if e is None else e[-1:])
            row.append(int(scores[-1].argmax()))
            if row[-1] == self.lm.tokenizer.eos_token_id:
                break
            e = self.vectors([row])
        return row


def _model(case: Case, context: Context) -> FusionLM:
    dtype, device = case.dtype, context.device
    return context.once(
        f"model {dtype}",
        lambda: load(context.model, device=device, dtype=dtype, encoder_dtype=dtype),
    )


def _exact(context: Context) -> FusionLM:
    """The reference: float32, the plain equations; nothing kept of earlier prefixes."""
    lm = context.once(
        "exact", lambda: load(context.model, device=context.device, backend="reference")
    )
    return FusionLM(lm.model, lm.tokenizer, lm.planner)


def _exported(context: Context, precision: str) -> Any:
    """The model through ONNX Runtime, exported once."""

    def make() -> Any:
        try:
            import onnxruntime  # noqa: F401
            from fusion_model.export import OnnxFusionLM, export_model

            folder = context.scratch / precision
            export_model(context.model, folder, encoder=True, precision=precision)
            return OnnxFusionLM(folder, device=context.device, threads=torch.get_num_threads())
        except ImportError as error:
            raise Unavailable(f"{error.name} is not installed: the extra [onnx]") from None
        except FusionLMError as error:
            raise Unavailable(str(error)) from None

    return context.once(f"onnx {precision}", make)


def of_encoder(encoder: HFEncoder, dtype: str, tokens: float, calls: int) -> Counts:
    """Of reading `tokens` tokens in `calls` calls; its table of input vectors is not multiplied."""
    table = encoder.model.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in encoder.model.parameters()) - table
    return Counts(2.0 * weights * tokens, float(weights * SIZE[dtype] * calls))


def counts(
    lm: FusionLM, dtype: str, lengths: Sequence[int], inputs: set[EncoderInput], calls: int
) -> Counts:
    """Of the whole model over sentences of `lengths` predictions, with their distinct prefixes.

    Args:
        calls: how often all weights must be read at least (once a token when generating).
    """
    config, size, tokens = lm.model.config, SIZE[dtype], sum(lengths)
    total = lstm(1, tokens, config.embedding_size, config.hidden_size, size)
    if config.fusion in EARLY:  # every prefix is a recurrence of its own
        more = sum(n * (n - 1) / 2 for n in lengths)
        total += Counts(8.0 * more * config.hidden_size**2, 0.0)
    total += matmul(tokens, lm.model.projection.in_features, config.embedding_size, size)
    total += matmul(tokens, config.embedding_size, config.vocab_size, size)
    if lm.planner is not None and isinstance(lm.planner.encoder, HFEncoder):
        # Keys and values kept, a prefix costs its last token; vectors held, at best nothing.
        of_policy = {"every": sum(len(i.ids) // 4 for i in inputs), "incremental": len(inputs)}
        read = of_policy.get(lm.planner.policy.name, 0)
        total += of_encoder(lm.planner.encoder, dtype, read, calls)
    own = sum(p.numel() for p in lm.model.parameters()) * size
    return total + Counts(0.0, float(own * (calls - 1)))


def embedding(case: Case, context: Context) -> Work:
    """Mean of tokens by all-MiniLM-L6-v2, which every way of doing it knows."""
    encoder = mean_encoder(case.dtype, context.device)
    words = [s.split() for s in context.sentences]
    texts = [" ".join(w[:t]) for w in words for t in range(len(w) + 1)]
    encode = WAYS[case.backend](case.dtype, context.device)
    run = no_gradients(lambda: encode(texts))
    exact = WAYS["fusion-lm"]("float32", context.device)
    tokens = sum(len(i.ids) // 4 for i in set(encoder.inputs_from_texts(texts)))
    return Work(
        run,
        run,
        lambda: context.once((case.group, "expected"), lambda: exact(texts)),
        items=len(texts),
        counts=of_encoder(encoder, case.dtype, tokens, 1),
        tolerance=1e-4 if case.dtype == "float32" else 0.1,
    )


def _inputs(lm: FusionLM, sentences: Sequence[Sequence[int]]) -> set[EncoderInput]:
    return set() if lm.planner is None else set(lm.planner.inputs(sentences))


def _runner(case: Case, context: Context, lm: FusionLM) -> Callable[[], Any]:
    """The model of a backend, ready to score or generate, nothing kept of earlier prefixes."""
    if case.backend.startswith("onnx"):
        precision = {"onnx": "fp32", "onnx-int8": "int8"}[case.backend]
        exported = _exported(context, precision)

        def forgetful() -> Any:
            exported._cache = None  # else the second call of a benchmark encodes nothing
            return exported

        return forgetful
    check_backend(case.backend, context.device)

    def ours() -> FusionLM:
        lm.model.set_backend(case.backend)
        return FusionLM(lm.model, lm.tokenizer, lm.planner)

    return ours


def scoring(case: Case, context: Context) -> Work:
    lm = _model(case, context)
    documents = [Document("text", context.sentences)]
    sentences = Corpus.from_documents(documents, lm.tokenizer).sentences
    lengths = [len(s) - 1 for s in sentences]
    plainly = case.backend in (EAGER, "published")
    if plainly:
        plain = Plain(lm, restart=case.backend == "published")
        run = result = no_gradients(lambda: plain.score(sentences))
    else:
        model = _runner(case, context, lm)

        def run() -> Any:
            return model().score(documents)

        def result() -> Tensor:
            return torch.tensor([word.nats for word in run()])

    def reference() -> Tensor:
        """Of tokens for those that give tokens, of words for those that give words."""
        exact = _exact(context)
        if not plainly:
            return torch.tensor([word.nats for word in exact.score(documents)])
        corpus = Corpus.from_documents(documents, exact.tokenizer)
        scores = score_sentences(exact, exact.encode_corpus(corpus))
        return torch.cat([torch.as_tensor(s.tokens) for s in scores])

    return Work(
        run,
        result,
        lambda: context.once((case.group, plainly), reference),
        items=sum(lengths),
        counts=counts(lm, case.dtype, lengths, _inputs(lm, sentences), 1),
        tolerance=1e-3 if _is_exact(case) else 0.15,
    )


def _is_exact(case: Case) -> bool:
    return case.dtype == "float32" and case.backend != "onnx-int8"


def generation(case: Case, context: Context) -> Work:
    lm = _model(case, context)
    words = max((s.split() for s in context.sentences), key=len)
    prompt = " ".join(words[: max(1, len(words) // 2)])
    row: list[int] = lm.prompt_ids(prompt)[0].tolist()
    exact = _exact(context)
    options = {"max_new_tokens": context.new_tokens, "do_sample": False}
    if case.backend in (EAGER, "published"):
        plain = Plain(lm, restart=case.backend == "published")
        run = no_gradients(lambda: plain.generate(row, context.new_tokens))
    else:
        model = _runner(case, context, lm)

        def run() -> Any:
            return model().generate(prompt, **options)[0]

    def ids_of(text: str) -> Tensor:
        """Of an exact backend the tokens themselves; of another, how likely its text is."""
        if _is_exact(case):
            return torch.tensor([float(i) for i in lm.tokenizer(text)["input_ids"]])
        return torch.tensor([exact.perplexity([Document("made", [text])]).nats_per_token])

    def result() -> Tensor:
        out = run()
        return ids_of(out if isinstance(out, str) else _text(lm, out))

    def greedy() -> list[int]:
        """The tokens that are made, an end of the sentence among them."""
        ids = torch.tensor([row], device=exact.model.device)
        out = exact.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found: list[int] = out[0, len(row) :].tolist()
        return found

    made = context.once((case.group, "made"), greedy)
    items, length = _inputs(lm, [row, row + made]), len(row) + len(made) - 1
    return Work(
        run,
        result,
        lambda: ids_of(_text(exact, [*row, *made])),
        items=len(made),
        counts=counts(lm, case.dtype, [length], items, len(made)),
        tolerance=0.0 if _is_exact(case) else 0.25,
    )


def _text(lm: FusionLM, row: Sequence[int]) -> str:
    return str(lm.tokenizer.decode(list(row), skip_special_tokens=True))
