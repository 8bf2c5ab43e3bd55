"""`generate` where a GPU encodes prefixes as they grow, on the CPU without its graphs: against
transformers' loop, and against the encoder called on whole sentences."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, SENTENCES, small_model, wordpiece
from fusion_model.kernels.triton import guards
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

from fusion_model import FusionLM, FusionLMForCausalLM, decoding, growing_token
from fusion_model.attached import PrefixCache
from fusion_model.config import LATE
from fusion_model.data.tokenizer import cut_vocabulary, train_bpe
from fusion_model.decoding import Choice, decode_on_host
from fusion_model.encoders import load_encoder
from fusion_model.encoders.incremental.static import StaticTexts
from fusion_model.growing_token import GrowingToken, tokens_of
from fusion_model.prefixes.planner import PrefixPlanner

TEXTS = [*SENTENCES[:2], "Unhappily, thereupon", ""]
POOLING = "static+last@1+mean@1"


@pytest.fixture(scope="module")
def bpe280() -> Any:
    """Few merges: most tokens are bytes, and words have many."""
    return train_bpe(SENTENCES, 280)


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT that reads more than two steps of the cache."""
    torch.manual_seed(1)
    folder, tokenizer = tmp_path_factory.mktemp("long"), wordpiece()
    size = ARCHITECTURES["bert"][2] | {"max_position_embeddings": 200}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), **size))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


Make = Callable[..., FusionLM]


@pytest.fixture
def make(long_folder: Path, bpe280: Any) -> Make:
    def made(
        vocabulary: str = "bpe",
        pooling: str = POOLING,
        policy: str = "incremental",
        folder: Path = long_folder,
        dtype: str = "float32",
        **options: Any,
    ) -> FusionLM:
        encoder: Any = load_encoder(str(folder), pooling, policy=policy, dtype=dtype)
        shares = vocabulary == "encoder"
        tokenizer = cut_vocabulary(encoder.tokenizer, SENTENCES, 10_000) if shares else bpe280
        size = {"vocab_size": len(tokenizer), "prefix_size": encoder.dim, "fusion": "concat"}
        torch.manual_seed(2)
        model = small_model(**(size | {"initializer_range": 2.0} | options))
        with torch.no_grad():  # so that tokens vary
            for weights in model.lstm.parameters():
                weights.mul_(4)
        return FusionLM(
            model, tokenizer, PrefixPlanner(encoder, tokenizer, shares_vocabulary=shares)
        )

    return made


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU counts as a GPU; the steps of each call that was served, its trial aside."""
    calls: list[int] = []
    ours = growing_token.tokens_of

    def noting(*args: Any) -> Any:
        if len(args) > 4:
            calls.append(args[3])
        return ours(*args)

    monkeypatch.setattr(growing_token, "tokens_of", noting)
    monkeypatch.setattr(growing_token, "DEVICES", ("cpu",))
    monkeypatch.setattr(decoding, "sample", lambda *args: None)
    return calls


@pytest.fixture
def lengths(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Places that attention read."""
    found: set[int] = set()
    encode = StaticTexts.encode

    def noting(*args: Any) -> Tensor:
        found.add(args[-1])
        return encode(*args)

    monkeypatch.setattr(StaticTexts, "encode", noting)
    return found


def prompts(lm: FusionLM) -> tuple[Tensor, Tensor]:
    """Of different lengths, one of them empty, padded on the left; and their mask."""
    rows = [lm.prompt_row(text) for text in ("The cat sat on", "", "Unhapp")]
    most = max(map(len, rows))
    ids = torch.tensor([[0] * (most - len(row)) + row for row in rows])
    return ids, (torch.arange(most) >= torch.tensor([[most - len(row)] for row in rows])).long()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("pooling", [POOLING, "mean", "last+mean+static+mean@1+last@0"])
def test_vectors_are_those_of_whole_sentences(
    name: str, pooling: str, encoder_folders: dict[str, Path], bpe280: Any
) -> None:
    """Words grow and are split otherwise; a text begins when others have begun."""
    encoder: Any = load_encoder(str(encoder_folders[name]), pooling, policy="incremental")
    planner = PrefixPlanner(encoder, bpe280)
    rows = [bpe280(text)["input_ids"] for text in TEXTS]
    whole = [planner.inputs([row]) for row in rows]
    texts, held = StaticTexts(encoder, len(rows)), [[] for _ in rows]
    again = 0
    for t in range(2, max(map(len, rows)) + 4):
        inputs = [of_row[min(max(t - 3 * n, 0), len(of_row) - 1)] for n, of_row in enumerate(whole)]
        tails = [encoder.split(given)[1] for given in inputs]
        known = []
        for before, tail in zip(held, tails, strict=True):
            same = [a == b for a, b in zip(before, tail[:-1], strict=False)]
            known.append((*same, False).index(False))
        again += sum(n < len(before) - 1 for n, before in zip(known, held, strict=True))
        new = [tail[n:] for n, tail in zip(known, tails, strict=True)]
        width = max(map(len, new)) + 1
        found = texts.encode(
            torch.tensor(known) + texts.head,
            torch.tensor([len(row) for row in new]),
            torch.tensor([row + [7] * (width - len(row)) for row in new]),
            texts.length(texts.head + max(map(len, tails))),
        )
        torch.testing.assert_close(found, encoder.encode(inputs), atol=1e-5, rtol=1e-5)
        held = tails
    assert again, "some word should be split otherwise"


@pytest.mark.parametrize("vocabulary", ["bpe", "encoder"])
@pytest.mark.parametrize("fusion", LATE)
def test_greedy_is_that_of_transformers(
    fusion: str, vocabulary: str, make: Make, served: list[int], lengths: set[int]
) -> None:
    """Past the first step of the cache; each row ends at its own token, padded from there on."""
    lm = make(vocabulary, fusion=fusion, num_layers=2 if fusion in ("add", "gate") else 1)
    ids, mask = prompts(lm)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 110, "do_sample": False}
    free = lm.model.generate(ids, **options, eos_token_id=None)
    assert vocabulary == "bpe" or {64, 128} <= lengths  # many bytes are no text
    common = Counter(free[:, ids.shape[1] + 2 :].flatten().tolist()).most_common()
    for eos in (None, common[0][0], common[-1][0]):
        options |= {"eos_token_id": eos, "pad_token_id": 0}
        theirs = lm.model.generate(ids, return_dict_in_generate=True, **options).sequences
        assert torch.equal(lm.model.generate(ids, **options), theirs)
    assert len(served) == 4


@pytest.mark.parametrize("vocabulary", ["bpe", "encoder"])
def test_texts_that_outgrow_the_window(
    vocabulary: str, make: Make, bert_folder: Path, served: list[int], capsys: Any
) -> None:
    """As on the ordinary path they go on with their last part, and it is told once."""
    lm = make(vocabulary, folder=bert_folder)
    assert lm.planner is not None
    options: dict[str, Any] = {"max_new_tokens": 150, "do_sample": False, "eos_token_id": None}
    ids, _ = prompts(lm)
    theirs = lm.model.generate(ids, return_dict_in_generate=True, **options).sequences
    lm.model.prefix_encoder = PrefixCache(lm.planner)
    capsys.readouterr()
    assert torch.equal(lm.model.generate(ids, **options), theirs)
    assert served == [150]
    assert capsys.readouterr().err.count("outgrows the encoder's window") == 1


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("temperature", [0.0, 0.8, 100.0])
@pytest.mark.parametrize("vocabulary", ["bpe", "encoder"])
def test_the_same_noise_draws_the_same_tokens(
    vocabulary: str, temperature: float, top_k: int, make: Make
) -> None:
    """As the host's loop; of a hot softmax bytes of no character, and special tokens, too. The last
    step's vectors and scores are those of all tokens read at once."""
    lm = make(vocabulary, "last+static+mean", fusion="gate")
    ids, mask = prompts(lm)
    choice = Choice(temperature, top_k)
    for steps in (2, 5, 80):
        torch.manual_seed(0)
        theirs = decode_on_host(lm.model, ids, None, mask, steps, choice)
        torch.manual_seed(0)
        token = GrowingToken(lm.model, len(ids), choice)
        tokens, found = tokens_of(token, ids, mask, steps)
        assert torch.equal(tokens, theirs)
        read, read_mask = tokens[:, :-1], torch.ones_like(tokens[:, :-1])
        read_mask[:, : mask.shape[1]] = mask
        with torch.no_grad():
            e = lm.model.encode_prefixes(read, read_mask, 0)
            scores = lm.model(read, read_mask, e).logits[:, -1]
        for got, expected in zip(found, (e[:, -1], scores), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    if temperature == 100 and not top_k:
        special = set(lm.tokenizer.all_special_ids)
        assert special & set(tokens[:, ids.shape[1] :].flatten().tolist())


@pytest.mark.parametrize("vocabulary", ["bpe", "encoder"])
def test_special_tokens_leave_a_text_as_it_is(
    vocabulary: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one, too."""
    lm = make(vocabulary)
    chosen = torch.tensor([[0, 1, 40, 1, 41, 42], [1, 1, 0, 43, 0, 44], [45, 1, 46, 0, 1, 1]])
    ids = torch.ones(3, 1, dtype=torch.int64)
    for steps in range(2, 7):
        left = iter(chosen.t())
        monkeypatch.setattr(growing_token, "choose", lambda scores, choice, left=left: next(left))
        token = GrowingToken(lm.model, 3, Choice())
        tokens, found = tokens_of(token, ids, ids, steps)
        assert torch.equal(tokens[:, 1:], chosen[:, :steps])
        e = lm.model.encode_prefixes(tokens[:, :-1], torch.ones_like(tokens[:, :-1]), 0)
        torch.testing.assert_close(found[0], e[:, -1], atol=1e-5, rtol=1e-5)


class Recorder:
    """`cuda_graphs.record` without a GPU: a graph that runs its function again."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, run: Callable[[], Any]) -> tuple[Any, Any]:
        for _ in range(2):
            run()
        self.captured += 1
        self.run, out = run, run()
        graph = type("Graph", (), {"replay": lambda _: self.replay(run, out)})()
        return graph, out

    def replay(self, run: Callable[[], Any], out: Any) -> None:
        self.replayed += 1
        for kept, new in zip(out, run(), strict=True):
            kept.copy_(new)


class Ops(TorchDispatchMode):
    """Names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("vocabulary", ["bpe", "encoder"])
def test_a_token_is_a_graph(
    vocabulary: str, make: Make, lengths: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each step of the cache, captured without a trace, and again in the next call; the
    host looks up words, or nothing. What is captured reads no value on the host."""
    recorder, fork, looked_up = Recorder(), torch.random.fork_rng, []
    monkeypatch.setattr(growing_token, "record", recorder)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: fork(()))
    pieces = PrefixCache.pieces
    monkeypatch.setattr(PrefixCache, "pieces", lambda *args: looked_up.append(1) or pieces(*args))
    lm = make(vocabulary)
    choice, steps = Choice(0.8, 10, eos=2, pad=0), 160
    ids, mask = prompts(lm)
    found = []
    for graph in (False, True):
        token = GrowingToken(lm.model, len(ids), choice)
        token.graph = graph
        for _ in range(2):
            torch.manual_seed(3)
            found.append(tokens_of(token, ids, mask, steps)[0])
    assert all(torch.equal(found[0], other) for other in found[1:])
    made = found[0].shape[1] - ids.shape[1] - 1
    assert recorder.captured == len(lengths) > 1
    assert len(looked_up) == 4 * (1 if vocabulary == "encoder" else made)
    wide = 2 * made - recorder.replayed
    assert wide == 2 if vocabulary == "encoder" else 2 <= wide < made
    with torch.no_grad(), Ops() as ops:
        recorder.run()
    assert len(ops.names) > 20
    reading = ("_local_scalar", "nonzero", "_to_copy.default", "masked_select", "unique")
    copies = {name for name in ops.names if any(part in name for part in reading)}
    assert copies <= {"aten._to_copy.default"}  # to float32


def test_it_is_kept_while_it_fits(
    make: Make, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    kind = growing_token.GrowingToken
    monkeypatch.setattr(
        growing_token, "GrowingToken", lambda *a, **k: made.append(1) or kind(*a, **k)
    )
    lm = make()
    with torch.inference_mode():
        first = lm.generate("The cat", max_new_tokens=20, do_sample=False)
    assert lm.generate("The cat", max_new_tokens=20, do_sample=False) == first
    assert len(made) == 1
    sampled = lm.generate("The", max_new_tokens=9, do_sample=True, num_return_sequences=3, seed=4)
    again = lm.generate("The", max_new_tokens=9, do_sample=True, num_return_sequences=3, seed=4)
    assert sampled == again
    assert len(set(sampled)) > 1
    assert len(made) == 2
    assert len(served) == 4
    model = weakref.ref(lm.model)
    del lm
    gc.collect()
    assert model() is None


class Collected:
    """A streamer."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_each_token(make: Make, served: list[int]) -> None:
    lm = make("encoder")
    ids, mask = prompts(lm)
    streamer = Collected()
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    out = lm.model.generate(ids, streamer=streamer, **options)
    assert streamer.given[1:] == out[:, ids.shape[1] :].t().tolist()
    assert streamer.ended == len(served) == 1


@pytest.mark.parametrize("wrong", ["", "rounded", "vector", "state", "error"])
def test_one_that_is_wrong_is_not_used(
    wrong: str, make: Make, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(guards, "checked", {})
    encode, start = StaticTexts.encode, GrowingToken.start
    if wrong == "vector":
        monkeypatch.setattr(StaticTexts, "encode", lambda *args: encode(*args) * 1.001)
    if wrong == "state":
        forgetting = lambda self, scores, state: start(self, scores, [s * 0.99 for s in state])  # noqa: E731
        monkeypatch.setattr(GrowingToken, "start", forgetting)
    if wrong == "error":
        monkeypatch.setattr(StaticTexts, "encode", None)
    lm = make(num_layers=2, dtype="bfloat16" if wrong == "rounded" else "float32")
    ids, mask = prompts(lm)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    theirs = lm.model.generate(ids, return_dict_in_generate=True, **options).sequences
    right = wrong in ("", "rounded")
    warning = pytest.warns(RuntimeWarning, match="growing_token .* is not used")
    with nullcontext() if right else warning:
        assert torch.equal(lm.model.generate(ids, **options), theirs)
    assert torch.equal(lm.model.generate(ids, **options), theirs)
    assert served == ([9, 9] if right else [])
    assert lm.model.backend == "auto"


OTHERS: dict[str, dict[str, Any]] = {
    "cls": {"pooling": "cls+mean"},
    "mask": {"pooling": "mask"},
    "static alone": {"pooling": "static"},
    "exact": {"policy": "every"},
    "refreshed": {"policy": "incremental+refresh:4"},
    "early fusion": {"fusion": "init_both", "prefix_size": 16, "pooling": "mean"},
    "input fusion": {"fusion": "input"},
}
REQUESTS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 2},
    "penalty": {"repetition_penalty": 1.3},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("what", [*OTHERS, *REQUESTS, "equations", "memory"])
def test_all_else_takes_the_ordinary_path(
    what: str, make: Make, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make(**OTHERS.get(what, {}))
    if what == "equations":
        lm.model.set_backend("reference")
    if what == "memory":
        monkeypatch.setattr(growing_token, "MOST", 10_000)
    ids, mask = prompts(lm)
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    assert lm.model.generate(ids, **options, **REQUESTS.get(what, {})).shape[0] == 3
    assert not served


def test_given_vectors_need_no_encoder(
    make: Make, served: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make()
    monkeypatch.setattr(FusionLMForCausalLM, "prefix_encoder", property(lambda self: 1 / 0))
    lm.model.generate(torch.ones(2, 3).long(), prefix_embeds=torch.ones(2, 48), max_new_tokens=2)
    assert not served


def test_a_cpu_keeps_its_own_loop(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing_token, "tokens_of", None)
    lm = make()
    assert isinstance(lm.model, FusionLMForCausalLM)
    lm.model.generate(torch.tensor([[1]]), max_new_tokens=3, do_sample=False)
    lm.model.generate(torch.tensor([[1]]), max_new_tokens=3, num_beams=2)
