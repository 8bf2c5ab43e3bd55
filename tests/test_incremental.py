"""Policies against the encoder called one text at a time, with the attention that they define."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, SENTENCES, small_model
from transformers import AutoModel, AutoTokenizer

from fusion_model.data.tokenizer import cut_vocabulary, train_bpe
from fusion_model.encoders import load_encoder
from fusion_model.encoders import pretrained as hf_encoder
from fusion_model.encoders.controls import BagEncoder
from fusion_model.encoders.incremental.encoder import IncrementalEncoder
from fusion_model.encoders.inputs import EncoderInput
from fusion_model.encoders.policies import parse_policy
from fusion_model.encoders.pretrained import counted_tokens
from fusion_model.errors import EncoderError, FusionLMError
from fusion_model.language_model import FusionLM
from fusion_model.prefixes.growing import GrowingInputs, Grown, can_grow
from fusion_model.prefixes.planner import PrefixPlanner
from fusion_model.prefixes.stream import PrefixStream

TEXTS = [*SENTENCES[:4], "Unhappily, thereupon", "The mat"]
POOLINGS = ("cls", "mean", "last", "sep", "mask", "mean@1")


@pytest.fixture(scope="module")
def small_bpe():
    """Few merges, so that prefixes end inside words."""
    return train_bpe(SENTENCES, 280)


class Reference:
    """transformers' own model on one text: head all to all, later tokens causally after it."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        embeddings = self.model.embeddings
        padding = embeddings.position_embeddings.padding_idx
        self.first = 0 if padding is None else padding + 1

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text)["input_ids"][1:-1]

    @torch.no_grad()
    def vector(self, head: list[int], tail: list[int], pooling: str) -> torch.Tensor:
        cls, sep = self.tokenizer("")["input_ids"]
        name, _, layer = pooling.partition("@")
        if name == "static":
            weight = self.model.get_input_embeddings().weight
            return weight[[cls, *head, *tail][-1]]
        tokens = [cls, *head, sep, *tail]
        positions = [*range(len(head) + 2), *range(len(head) + 1, len(head) + 1 + len(tail))]
        end = len(head) + len(tail) + 1
        if name == "mask" or (name in ("cls", "sep", "pooler") and tail):
            tokens.append({"mask": self.tokenizer.mask_token_id, "sep": sep}.get(name, cls))
            positions.append(0 if name in ("cls", "pooler") else end)
        query = len(tokens) > len(head) + 2 + len(tail)
        sees = torch.ones(len(tokens), len(tokens)).tril().bool()
        sees[: len(head) + 2, : len(head) + 2] = True
        bias = torch.zeros(sees.shape).masked_fill(~sees, -1e30)[None, None]
        at = torch.tensor([positions])
        options = {"position_ids": at + self.first}
        if self.model.config.model_type == "mpnet":
            encoder = self.model.encoder
            buckets = encoder.relative_position_bucket(at[0][None, :] - at[0][:, None])
            values = encoder.relative_attention_bias(buckets).permute(2, 0, 1)[None]
            encoder.compute_position_bias = lambda hidden: values
        out = self.model(
            input_ids=torch.tensor([tokens]),
            attention_mask=bias,
            output_hidden_states=True,
            **options,
        )
        hidden = out.hidden_states[int(layer) if layer else -1][0]
        if name == "mean":
            return hidden[: len(tokens) - query].mean(0)
        if name == "last":
            return hidden[len(tokens) - 1 if tail else len(head)]
        node = hidden[-1] if query else hidden[0] if name in ("cls", "pooler") else hidden[-1]
        return self.model.pooler(node[None, None])[0] if name == "pooler" else node


def prefix_ids(reference: Reference, tokenizer, sentence: str) -> list[list[int]]:
    """The encoder's ids of every prefix of a sentence."""
    ids = tokenizer(sentence)["input_ids"]
    texts = [tokenizer.decode(ids[:t]).rstrip("�").strip() for t in range(len(ids) + 1)]
    return [reference.ids(text) for text in texts]


def expected(reference: Reference, prefixes: list[list[int]], pooling: str, k: int):
    """What a policy defines for each prefix of one sentence."""
    vectors = []
    for t, ids in enumerate(prefixes):
        anchor = prefixes[t - t % k] if k else []
        same = 0
        while same < min(len(anchor), len(ids)) and anchor[same] == ids[same]:
            same += 1
        parts = [reference.vector(ids[:same], ids[same:], p) for p in pooling.split("+")]
        vectors.append(torch.cat(parts))
    return torch.stack(vectors)


@pytest.mark.parametrize("policy", ["incremental", "incremental+refresh:3"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_whole_sentences_are_the_definition(
    name: str, policy: str, encoder_folders: dict[str, Path], small_bpe, monkeypatch
) -> None:
    monkeypatch.setattr(hf_encoder.HFEncoder, "budget", 150)  # several batches
    folder = encoder_folders[name]
    pooling = "+".join((*POOLINGS, "static", *(["pooler"] if name != "distilbert" else [])))
    encoder = load_encoder(str(folder), pooling, policy=policy)
    reference, k = Reference(folder), parse_policy(policy).k
    inputs = PrefixPlanner(encoder, small_bpe).inputs([small_bpe(t)["input_ids"] for t in TEXTS])
    found = encoder.encode(inputs)
    prefixes = [prefix_ids(reference, small_bpe, text) for text in TEXTS]
    assert any(a != b[: len(a)] for p in prefixes for a, b in itertools.pairwise(p)), (
        "a prefix should end inside a word that is split otherwise"
    )
    wanted = torch.cat([expected(reference, p, pooling, k) for p in prefixes])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", ["incremental", "incremental+refresh:4"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("room", [1.0, 0.02], ids=["room", "eviction"])
def test_streams_are_whole_sentences(
    name: str, policy: str, room: float, encoder_folders: dict[str, Path], small_bpe
) -> None:
    """Sequences join, leave, fork and come back; each step is one batch."""
    pooling = "mean+last+cls+static+mask"
    encoder = load_encoder(str(encoder_folders[name]), pooling, policy=policy)
    assert isinstance(encoder, IncrementalEncoder)
    planner = PrefixPlanner(encoder, small_bpe)
    rows = [small_bpe(text)["input_ids"] for text in TEXTS]
    whole = [encoder.encode(planner.inputs([row])) for row in rows]
    held = encoder.stream(max_bytes=int(room * 2**21))
    stream = PrefixStream(planner, size=3)
    stream._encode = held.encode
    generator, lengths = random.Random(0), [0] * len(rows)
    for _ in range(60):
        going = [i for i in range(len(rows)) if generator.random() < 0.5]
        for i in going:
            lengths[i] = lengths[i] + 1 if lengths[i] < len(rows[i]) else generator.randrange(3)
        if not going:
            continue
        found = stream.step([[1, *rows[i][: lengths[i]]] for i in going])
        wanted = torch.stack([whole[i][lengths[i]] for i in going])
        torch.testing.assert_close(torch.stack(found), wanted, atol=1e-5, rtol=1e-5)
        assert held.cache.nbytes <= room * 2**21
        assert held.cache.entries


def test_a_streamed_token_is_one_node(bert_folder: Path, monkeypatch) -> None:
    encoder = load_encoder(str(bert_folder), "mean", policy="incremental")
    tokenizer = cut_vocabulary(encoder.tokenizer, SENTENCES, 10_000)
    ids = tokenizer(SENTENCES[3])["input_ids"]
    stream = PrefixStream(PrefixPlanner(encoder, tokenizer, shares_vocabulary=True))
    nodes = []
    embed = encoder.layers.embed
    monkeypatch.setattr(
        encoder.layers, "embed", lambda ids, at: nodes.append(ids.numel()) or embed(ids, at)
    )
    for t in range(1, len(ids) + 1):
        stream.step([ids[:t], ids[:t]])  # two beams that are still alike
    assert nodes == [3] + [1] * (len(ids) - 1)  # [CLS] and [SEP] with the first


def test_one_pass_a_sentence(bert_folder: Path, monkeypatch) -> None:
    encoder = load_encoder(str(bert_folder), "mean", policy="incremental")
    tokenizer = cut_vocabulary(encoder.tokenizer, SENTENCES, 10_000)
    rows = [tokenizer(text)["input_ids"] for text in (SENTENCES[3], SENTENCES[0])]
    inputs = PrefixPlanner(encoder, tokenizer, shares_vocabulary=True).inputs(rows)
    nodes = []
    embed = encoder.layers.embed
    monkeypatch.setattr(
        encoder.layers, "embed", lambda ids, at: nodes.append(ids.numel()) or embed(ids, at)
    )
    encoder.encode(inputs)
    assert sum(nodes) == sum(map(len, rows)) + 2 * len(rows)


@pytest.mark.parametrize(
    ("policy", "anchors"),
    [
        ("every", [0, 1, 2, 3, 4, 5, 6]),
        ("word", [0, 1, 1, 3, 4, 4, 6]),
        ("stride:1", [0, 1, 2, 3, 4, 5, 6]),
        ("stride:4", [0, 0, 0, 0, 4, 4, 4]),
        ("incremental+refresh:5", [0, 0, 0, 0, 0, 5, 5]),
    ],
)
def test_anchors(policy: str, anchors: list[int]) -> None:
    starts_word = [True, False, True, True, False, True]
    found = parse_policy(policy).anchors(starts_word)
    assert found == anchors
    for cut in range(len(starts_word)):  # no anchor depends on a later token
        assert parse_policy(policy).anchors(starts_word[:cut]) == anchors[: cut + 1]


@pytest.mark.parametrize(
    "policy", ["", "always", "stride", "stride:0", "stride:K", "stride:-2", "refresh", "word:2"]
)
def test_unknown_policies_are_named(policy: str) -> None:
    with pytest.raises(FusionLMError, match=r"unknown policy .*choose one of auto, every, word"):
        parse_policy(policy)


@pytest.mark.parametrize("pooling", ["mean", "static+mean", "static"])
@pytest.mark.parametrize("policy", ["word", "stride:3", "sentence"])
def test_held_vectors(policy: str, pooling: str, bert_folder: Path, small_bpe) -> None:
    reference = Reference(bert_folder)
    encoder = load_encoder(str(bert_folder), pooling, policy=policy)
    rows = [small_bpe(text)["input_ids"] for text in TEXTS]
    found = encoder.encode(
        PrefixPlanner(encoder, small_bpe).inputs([[1, *row, 2] for row in rows], [[], *rows[:-1]])
    )
    start = 0
    for number, (text, row) in enumerate(zip(TEXTS, rows, strict=True)):
        prefixes = prefix_ids(reference, small_bpe, text)
        before = reference.ids(TEXTS[number - 1]) if number else []
        texts = [small_bpe.decode(row[:t]) for t in range(len(row) + 1)]
        anchor = 0
        for t in range(len(prefixes)):
            if policy == "word" and t and (t == 1 or not texts[t][len(texts[t - 1])].isalnum()):
                anchor = t
            elif policy == "stride:3":
                anchor = t - t % 3
            context = before if policy == "sentence" else prefixes[anchor]
            parts = [
                reference.vector(prefixes[t] if p == "static" else context, [], p)
                for p in pooling.split("+")
            ]
            torch.testing.assert_close(found[start], torch.cat(parts), atol=1e-5, rtol=1e-5)
            start += 1
    assert start == len(found)


def test_a_held_context_is_encoded_once(bert_folder: Path, small_bpe) -> None:
    encoder = load_encoder(str(bert_folder), "static+mean", policy="stride:4")
    planner = PrefixPlanner(encoder, small_bpe)
    row = [1, *small_bpe(TEXTS[3])["input_ids"]]
    stream = PrefixStream(planner)
    stream.step([row[:1]])  # the first batch is run twice, to prove our own pass
    with counted_tokens(encoder) as calls:
        for t in range(2, len(row) + 1):
            stream.step([row[:t]])
    assert len(calls) == (len(row) - 1) // 4


@pytest.mark.parametrize(
    "policy", ["every", "word", "stride:3", "sentence", "incremental", "incremental+refresh:4"]
)
@pytest.mark.parametrize("shares", [False, True], ids=["bpe", "shared"])
def test_last_inputs_are_those_of_the_sentence(
    policy: str, shares: bool, bert_folder: Path, small_bpe
) -> None:
    encoder = load_encoder(str(bert_folder), "static+mean", policy=policy)
    tokenizer = cut_vocabulary(encoder.tokenizer, SENTENCES, 10_000) if shares else small_bpe
    planner = PrefixPlanner(encoder, tokenizer, shares_vocabulary=shares)
    for text in TEXTS:
        row = [1, *tokenizer(text)["input_ids"]]
        inputs = planner.inputs([row])
        assert planner.last_inputs(row, 0) == inputs
        for t in range(1, len(row) + 1):
            assert planner.last_inputs(row[:t], -1) == [inputs[t - 1]]


@pytest.mark.parametrize("policy", ["every", "incremental"])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_growing_text_has_the_inputs_of_the_whole(
    policy: str, name: str, encoder_folders: dict[str, Path], small_bpe
) -> None:
    """Tokens in any order: characters in pieces, spaces alone, special tokens."""
    encoder = load_encoder(str(encoder_folders[name]), "static+mean", policy=policy)
    planner = PrefixPlanner(encoder, small_bpe)
    assert can_grow(planner)
    growing = GrowingInputs(planner)
    odd = small_bpe("  a\n\n b \t c 漢字 🙂 é � x �� y")["input_ids"]
    generator = random.Random(0)
    rows = [odd, *(generator.choices(range(len(small_bpe)), k=12) for _ in range(40))]
    rows += [generator.choices([*odd, 1], k=12) for _ in range(40)]
    for row in rows:
        text, content = Grown(), []
        for token in row:
            text = growing.grown(text, token)
            content.append(token)
            assert growing.input(text) == planner.last_inputs(content, -1)[0], content


def test_stride_of_words_counts(small_bpe) -> None:
    """A policy works for any encoder; an incremental one needs tokens."""
    encoder = BagEncoder.fit("counts", SENTENCES)
    encoder.policy = "stride:2"
    ids = small_bpe("The cat sat on the mat.")["input_ids"]
    inputs = PrefixPlanner(encoder, small_bpe).inputs([ids])
    assert inputs[1] == inputs[0] == EncoderInput()
    assert inputs[5] == inputs[4] != inputs[6]
    with pytest.raises(EncoderError, match="'counts' cannot be incremental"):
        load_encoder("counts", policy="incremental")


def test_policy_goes_with_the_prefix_view(bert_folder: Path, small_bpe) -> None:
    encoder = load_encoder(str(bert_folder), policy="stride:2")
    with pytest.raises(FusionLMError, match=r"policy 'stride:2' goes with view 'prefix' only"):
        PrefixPlanner(encoder, small_bpe, "sentence")


def test_an_unknown_architecture_cannot_be_incremental(bert_folder: Path, monkeypatch) -> None:
    monkeypatch.delitem(hf_encoder.EncoderLayers.__init__.__globals__["ARCHITECTURES"], "bert")
    with pytest.raises(EncoderError, match="cannot be incremental: bert is not one of roberta"):
        load_encoder(str(bert_folder), "mean", policy="incremental")


@pytest.mark.parametrize("pooling", ["mean", "cls+last", "static+mean@1", "sep@1+mask"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_pass_that_differs_is_not_used(
    name: str, pooling: str, encoder_folders: dict[str, Path], monkeypatch
) -> None:
    """Our own pass and transformers' are both right; a wrong one is noticed."""
    folder = str(encoder_folders[name])
    ours, theirs = load_encoder(folder, pooling), load_encoder(folder, pooling)
    inputs = ours.inputs_from_texts(TEXTS)
    monkeypatch.setattr(theirs, "_proven_layers", lambda inputs: None)
    torch.testing.assert_close(ours.encode(inputs), theirs.encode(inputs), atol=1e-5, rtol=1e-5)
    assert ours._layers is not None
    wrong = load_encoder(folder, pooling)
    with torch.no_grad():
        original = hf_encoder.EncoderLayers.run
        monkeypatch.setattr(
            hf_encoder.EncoderLayers,
            "run",
            lambda *args: [out + 1e-3 for out in original(*args)],
        )
    with pytest.warns(UserWarning, match="our own pass differs from transformers'"):
        found = wrong.encode(inputs)
    torch.testing.assert_close(found, theirs.encode(inputs))


def test_words_are_tokenised_once_and_proven(bert_folder: Path, monkeypatch) -> None:
    encoder = load_encoder(str(bert_folder), "mean")
    plain = encoder._tokenized(TEXTS * 2)
    plain = [EncoderInput(ids) for ids in plain]
    assert encoder.inputs_from_texts(TEXTS * 2) == plain  # tried
    asked = []
    tokenized = encoder._tokenized
    monkeypatch.setattr(encoder, "_tokenized", lambda t: asked.append(list(t)) or tokenized(t))
    assert encoder.inputs_from_texts(TEXTS * 2) == plain
    assert asked == []  # every word is known by now
    wrong = load_encoder(str(bert_folder), "mean")
    whole = wrong._tokenized
    monkeypatch.setattr(
        wrong,
        "_tokenized",
        lambda texts: [
            ids[:-4] + ids[4:8] + ids[-4:] if " " in text else ids
            for ids, text in zip(whole(texts), texts, strict=True)
        ],
    )
    with pytest.warns(UserWarning, match="does not go word by word"):
        first = wrong.inputs_from_texts(TEXTS * 2)
    assert wrong.inputs_from_texts(TEXTS * 2) == first != plain


@pytest.mark.parametrize("policy", ["incremental", "incremental+refresh:4"])
def test_minilm_streams(policy: str, small_bpe) -> None:
    encoder = load_encoder("minilm", "static+last+mean+cls", policy=policy)
    planner = PrefixPlanner(encoder, small_bpe)
    row = small_bpe("The unhappy gentleman sat down, and said nothing.")["input_ids"]
    whole = encoder.encode(planner.inputs([row]))
    stream = PrefixStream(planner)
    found = [stream.step([[1, *row[:t]]])[0] for t in range(len(row) + 1)]
    torch.testing.assert_close(torch.stack(found), whole, atol=1e-5, rtol=1e-5)
    reference = Reference(encoders_path())
    prefixes = prefix_ids(reference, small_bpe, "The unhappy gentleman sat down, and said nothing.")
    wanted = expected(reference, prefixes, encoder.pooling, parse_policy(policy).k)
    torch.testing.assert_close(whole, wanted, atol=1e-5, rtol=1e-5)


def encoders_path() -> Path:
    from fusion_model.encoders.sources import minilm_path

    return minilm_path()


@pytest.mark.parametrize(("fusion", "encoded"), [("concat", 1), ("gate", 1), ("input", 4)])
def test_a_prompt_costs_what_its_fusion_needs(
    fusion: str, encoded: int, bert_folder: Path, small_bpe
) -> None:
    """Late fusion scores the next token from the last prefix alone."""
    model = small_model(fusion=fusion, vocab_size=len(small_bpe), prefix_size=16)
    encoder = load_encoder(str(bert_folder), "mean")
    lm = FusionLM(model, small_bpe, PrefixPlanner(encoder, small_bpe))
    asked = []
    encode = encoder._encode_unique
    encoder._encode_unique = lambda *args: asked.append(len(args[0])) or encode(*args)
    ids = torch.tensor([[1, *small_bpe("The cat sat on")["input_ids"][:3]]])
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    assert lm.planner is not None
    assert sum(asked) == encoded
