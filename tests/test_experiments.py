"""Every experiment, end to end at toy size; they resume, and say what they lack."""

import base64
import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from conftest import SENTENCES
from scipy import stats
from typer.testing import CliRunner

from fusion_model import FusionLMConfig
from fusion_model.cli import app
from fusion_model.data.text import Document, detokenize
from fusion_model.errors import FusionLMError
from fusion_model.experiments import study as study_module
from fusion_model.experiments.arms import arms_of
from fusion_model.experiments.baselines import DroppingLM, EmbeddingOnlyLM, RegularisedLM
from fusion_model.experiments.corpora import Texts, find_corpora, write_texts
from fusion_model.experiments.losses import read_test
from fusion_model.experiments.reading.data import plain
from fusion_model.experiments.runner import EXPERIMENTS, Experiments
from fusion_model.experiments.sizes import Size, size_by_name
from fusion_model.experiments.study import Arm, Run, Study
from fusion_model.files import locked
from fusion_model.model import FusionLMForCausalLM
from fusion_model.training import run as run_module

TOY = Size(
    "toy",
    sentences=16,
    dev=4,
    test=6,
    training={
        "vocab_size": 300,
        "embedding_size": 6,
        "hidden_size": 8,
        "max_tokens": 40,
        "epochs": 2,
        "tokens_per_batch": 256,
    },
    learning_rates=(0.01,),
    dropouts=(0.1,),
    prefix_dropouts=(0.5,),
    data_sizes={8: 4, 16: 2},
)
STORIES = [SENTENCES[:8], SENTENCES[2:8], SENTENCES[3:7] + SENTENCES[:2]]


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The curve that every run draws takes longer than its training."""
    monkeypatch.setattr(run_module, "plot_metrics", lambda *_: None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for corpus, files in {"brown": ("a", "b", "c"), "letters": ("x",)}.items():
        (folder / corpus).mkdir(parents=True)
        for name in files:
            (folder / corpus / f"{name}.txt").write_text("\n".join(SENTENCES) + "\n")
    stories = folder / "natural-stories"
    stories.mkdir()
    generator = np.random.default_rng(0)
    tok, info = ["word\tzone\titem"], ["word\tzone\titem\tmeanItemRT"]
    for item, sentences in enumerate(STORIES, start=1):
        for zone, word in enumerate(" ".join(sentences).split(), start=1):
            tok.append(f"{word}\t{zone}\t{item}")
            info.append(f"{word}\t{zone}\t{item}\t{300 + 10 * generator.standard_normal():.2f}")
    (stories / "all_stories.tok").write_text("\n".join(tok) + "\n")
    (stories / "processed_wordinfo.tsv").write_text("\n".join(info[:1] + info[:0:-1]) + "\n")
    return folder


@pytest.fixture
def settings(data: Path, tmp_path: Path, bert_folder: Path) -> Experiments:
    return Experiments(TOY, [str(data)], tmp_path / "out", seeds=1, encoder=str(bert_folder))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_end_to_end(settings: Experiments, name: str) -> None:
    report = settings.run(name)
    text = report.read_text()
    saved = json.loads((report.parent / "results.json").read_text())
    assert saved["experiment"] == name
    for table in saved["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"])
        assert "nan" not in str(table["rows"])
        assert settings.encoder in table["caption"] + saved["setting"]
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (report.parent / figure).read_bytes().startswith(b"\x89PNG")
        assert (report.parent / figure).with_suffix(".pdf").stat().st_size > 1000
    assert name == "domain" or list(report.parent.glob("*.png"))


def test_interrupted_experiment_ends_the_same(
    settings: Experiments, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped during the second arm, then run again: as if never stopped, nothing done twice."""
    whole = settings.run("schedule").read_text()
    other = Experiments(TOY, [str(data)], tmp_path / "other", 1, settings.encoder)
    train, calls = study_module.train, []

    def stop_in_second(*args: object) -> object:
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(study_module, "train", stop_in_second)
    with pytest.raises(KeyboardInterrupt):
        other.run("schedule")
    assert other.run("schedule").read_text() == whole
    assert len(calls) == 8  # seven arms, one of them begun twice
    again = Experiments(TOY, [str(data)], tmp_path / "other", 1, settings.encoder)
    assert again.run("schedule").read_text() == whole
    assert len(calls) == 8


def test_one_process_at_a_time(settings: Experiments) -> None:
    settings.out.mkdir()
    with locked(settings.out / ".lock", "it"), pytest.raises(FusionLMError, match="in use by an"):
        settings.run("examples")


class Landscape(Study):
    """A study whose runs have the dev loss of a formula, and are counted."""

    def __init__(self, size: Size, out: Path, best: dict[str, float]) -> None:
        texts = Texts("made", out / "train", out / "train", out / "dev", {})
        super().__init__(size, texts, out, "minilm", 1, out / "results")
        self.best, self.tried = best, []

    def run(self, arm: Arm, settings: Mapping[str, float], seed: int) -> Run:
        self.tried.append(tuple(settings.values()))
        options = self.options(arm, settings, seed)
        away = [math.log(getattr(options, name) / at) ** 2 for name, at in self.best.items()]
        return Run(arm, options, self.out, {"epochs": [{"epoch": 1, "dev_loss": sum(away)}]})


@pytest.mark.parametrize("rate", [0.001, 0.004, 0.016])
@pytest.mark.parametrize("dropout", [0.2, 0.8])
def test_grids_are_climbed_to_their_best_value(rate: float, dropout: float, tmp_path: Path) -> None:
    grid = (0.001, 0.002, 0.004, 0.008, 0.016)
    size = dataclasses.replace(
        TOY, learning_rates=grid, dropouts=(0.2, 0.4, 0.8), prefix_dropouts=(0.1, 0.3, 0.9)
    )
    best = {"learning_rate": rate, "dropout": dropout, "prefix_dropout": 0.3}
    study = Landscape(size, tmp_path, best)
    found = study.tuned(Arm("fused", {"fusion": "concat"})).options
    assert {name: getattr(found, name) for name in best} == best
    assert len(set(study.tried)) == len(study.tried) <= 5 + 2 + 2
    unfused = Landscape(size, tmp_path, {"learning_rate": rate, "dropout": dropout})
    found = unfused.tuned(Arm("unfused", {"fusion": "none"})).options
    assert (found.learning_rate, found.dropout) == (rate, dropout)
    assert {tried[1] for tried in unfused.tried} == {0.3}  # dropout on e: there is no e


def test_dev_chooses_and_only_the_chosen_are_scored(data: Path, tmp_path: Path) -> None:
    size = dataclasses.replace(TOY, learning_rates=(1e-7, 0.02), dropouts=(0.1, 0.9))
    study = Experiments(size, [str(data)], tmp_path / "out", seeds=2).study_of(16)
    arm = Arm("unfused", {"fusion": "none"})
    runs = study.results([arm])[arm.name]
    chosen = [run.options for run in runs]
    assert [o.learning_rate for o in chosen] == [0.02, 0.02]
    assert [o.seed for o in chosen] == [0, 1]
    assert chosen[0].dropout == chosen[1].dropout
    points = [{"learning_rate": r, "dropout": p} for r in (1e-7, 0.02) for p in (0.1, 0.9)]
    losses = [study.run(arm, {**point, "prefix_dropout": 0.5}, 0).dev_loss for point in points]
    assert chosen[0].dropout == points[int(np.argmin(losses))]["dropout"]
    assert runs[0].dev_loss == min(m["dev_loss"] for m in runs[0].metrics) == min(losses)
    kept = [json.loads(path.read_text()) for path in study.kept.iterdir()]
    assert len(kept) == 4 + 1  # the whole grid, and the second seed
    assert sum(bool(run["losses"]) for run in kept) == 2


def test_a_fused_model_is_also_tested_on_embeddings_of_other_positions(
    settings: Experiments,
) -> None:
    """The same trained model, once: its losses with its own e, and with e drawn from the text."""
    study = settings.study_of(16)
    fused = Arm("fused", {"fusion": "concat", "pooling": "mean"})
    arms = [fused, dataclasses.replace(fused, name="misled", misled=True)]
    (own,), (misled,) = study.results(arms).values()
    assert own.path == misled.path
    assert len(list(study.kept.iterdir())) == 1
    test = study.texts.tests["test"]
    lm = study.open(own)
    documents, corpus = read_test(test, study.tokenizer, own.options)
    batches = lm.encode_corpus(corpus)
    for run, shuffle in ((own, "none"), (misled, "corpus")):
        lm.shuffle = shuffle
        assert run.scores(test)["nats"].sum() == pytest.approx(
            lm.perplexity(documents).nats, abs=0.01
        )
    assert own.scores(test)["nats"].sum() != misled.scores(test)["nats"].sum()
    cosines = []
    for index in range(len(batches.lengths)):
        e = torch.from_numpy(batches.batch([index]).prefix_embeds[0])
        cosines += torch.cosine_similarity(e[:-1], e[1:]).tolist()
    assert own.result["cosine"] == pytest.approx(np.mean(cosines), abs=1e-3)  # float16 in a store


def test_less_text_is_trained_on_for_as_many_steps(data: Path, tmp_path: Path) -> None:
    experiments = Experiments(TOY, [str(data)], tmp_path / "out", 1)
    part, whole = experiments.study_of(8), experiments.study_of(16)
    assert (part.size.sentences, part.size.training["epochs"]) == (8, 4)
    assert part.size.training["patience"] == 3 * 4 // 2
    assert whole.size.training["epochs"] == 2
    assert part.texts.tests == whole.texts.tests
    assert part.tokenizer.get_vocab() == whole.tokenizer.get_vocab()


def test_losses_of_another_test_text_are_not_taken(data: Path, tmp_path: Path) -> None:
    """Another test text under the same name, in the same folder: scored, not read back."""
    study = Experiments(TOY, [str(data)], tmp_path / "out", 1).study_of(16)
    arm = Arm("unfused", {"fusion": "none"})
    [run] = study.results([arm])[arm.name]
    other = tmp_path / "other" / "o.txt"
    other.parent.mkdir()
    other.write_text("Another text altogether.\nIt is short.\n")
    assert run.scores(study.texts.tests["test"])["words"].sum() != 6
    study.texts = dataclasses.replace(study.texts, tests={"test": other.parent})
    [again] = study.results([arm])[arm.name]
    assert again.path == run.path
    assert again.scores(other.parent)["words"].sum() == 6


def test_all_leaves_out_what_the_data_lack(data: Path, tmp_path: Path) -> None:
    everything = Experiments(TOY, [str(data)], tmp_path)
    assert everything.available() == list(EXPERIMENTS)
    little = Experiments(TOY, [str(data / "letters")], tmp_path)
    assert set(EXPERIMENTS) - set(little.available()) == {"reading-times", "domain"}


@pytest.mark.parametrize("size", ["small", "medium", "paper"])
def test_baselines_have_the_parameters_of_concat(size: str) -> None:
    chosen = size_by_name(size)
    counts = {}
    for arm in arms_of("data-size", chosen, 384, 6):
        fields = {**chosen.training, **arm.options}
        names = ("vocab_size", "embedding_size", "hidden_size", "fusion", "tie_weights")
        width = 384 * (1 + str(fields.get("pooling")).count("+"))
        with torch.device("meta"):
            config = FusionLMConfig(**{n: fields[n] for n in names if n in fields})
            config.prefix_size = width
            counts[arm.name] = sum(p.numel() for p in FusionLMForCausalLM(config).parameters())
    fused = counts["fused"]
    for name in ("unfused", "unfused, AWD", "static", "static at the input", "exact mean"):
        assert fused <= counts[name] < 1.015 * fused + 4000, name


def test_texts_are_nested_and_disjoint(data: Path, tmp_path: Path) -> None:
    corpora = find_corpora([str(data)])
    assert sorted(corpora) == ["brown", "letters"]
    numbered = {
        "brown": [
            type(d)(d.name, [f"{d.name} {i}" for i in range(len(d.sentences))])
            for d in corpora["brown"]
        ]
    }
    size = dataclasses.replace(TOY, sentences=20, dev=7, test=9)
    small, large = (write_texts(numbered, "brown", size, n, tmp_path / "t") for n in (10, 20))
    assert small.dev == large.dev
    assert small.tests == large.tests
    assert small.vocabulary == large.vocabulary == large.train
    assert len(lines(small.train)) == 10
    assert len(lines(large.dev)) == 7
    assert lines(small.train) < lines(large.train)
    assert not lines(large.train) & (lines(large.dev) | lines(large.tests["test"]))


def lines(folder: Path) -> set[str]:
    return {line for f in folder.glob("*.txt") for line in f.read_text().splitlines()}


def numbered(name: str, size: int) -> Document:
    return Document(name, [f"{name} {i}" for i in range(size)])


def test_mixed_texts(tmp_path: Path) -> None:
    """Training, dev and test parts of Brown and of books, by the numbers of their sentences."""
    books = ("bryant", "thursday", *(f"book{i}" for i in range(9)))
    corpora = {
        "brown": [numbered(f"genre{i}", 1000) for i in range(15)],
        "prose": [numbered(name, 500) for name in books],
        "speeches": [numbered(f"speech{i}", 40) for i in range(12)],
        "wikitext-2": [numbered("valid", 250)],
    }
    size = dataclasses.replace(
        TOY, mixed=True, sentences=16_500, dev=1700, test=1500, data_sizes={165: 1, 16_500: 1}
    )
    texts = write_texts(corpora, "mixture", size, 16_500, tmp_path)
    few = write_texts(corpora, "mixture", size, 165, tmp_path)
    assert lines(few.train) < lines(texts.train) == lines(texts.vocabulary)
    assert len(lines(texts.train)) == 15 * 800 + 9 * 500
    assert "genre3 799" in lines(texts.train)
    assert {"genre3 820", "genre14 899", "bryant 0"} < lines(texts.dev)
    assert not lines(texts.dev) & {"genre3 819", "genre3 900"}
    tests = {name: lines(folder) for name, folder in texts.tests.items()}
    assert {name: len(found) for name, found in tests.items()} == {
        "test": 1500,
        "thursday": 500,
        "speeches": 480,
        "wikitext-2": 250,
    }
    assert "genre3 900" in tests["test"]
    assert not set.union(*tests.values()) & (lines(texts.train) | lines(texts.dev))
    # What statistics take as independent: files, or runs of 100 sentences of few files.
    counts = {name: len(list(folder.glob("*.txt"))) for name, folder in texts.tests.items()}
    assert counts == {"test": 15, "thursday": 5, "speeches": 12, "wikitext-2": 3}
    with pytest.raises(FusionLMError, match="lacks prose, wikitext-2"):
        write_texts({k: corpora[k] for k in ("brown", "speeches")}, "mixture", size, 165, tmp_path)


def test_kept_runs_are_found_in_another_folder(
    data: Path, tmp_path: Path, bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a fresh clone: the files of finished runs, and none of the models."""
    dropouts = (0.5, 0.8)
    size = dataclasses.replace(
        TOY, tuned_at=8, learning_rates=(0.01, 0.02), prefix_dropouts=dropouts
    )
    kept = tmp_path / "kept"

    def experiments(out: str, **options: bool) -> Experiments:
        encoder = str(bert_folder)
        return Experiments(size, [str(data)], tmp_path / out, 1, encoder, results=kept, **options)

    whole = experiments("one").run("reading-times").read_text()
    monkeypatch.setattr(study_module, "train", None)
    assert experiments("two", finished=True).run("reading-times").read_text() == whole
    study = experiments("two").study_of(16)
    arm = next(a for a in arms_of("reading-times", size, 16, 2) if a.name == "fused")
    assert study.results([arm])["fused"]
    # What dev chose with 8 sentences, for any arm, is what was tried with 16, with each dropout on
    # e where there is an e.
    chosen = experiments("two").study_of(8).chosen(arms_of("reading-times", size, 16, 2))
    rates = {settings["learning_rate"] for settings in chosen}
    for name, own in (("fused", dropouts), ("unfused", dropouts[:1])):
        paths = list(kept.glob(f"{name}-16-*"))
        tried = [json.loads(path.read_text())["definition"] for path in paths]
        points = {(run["learning_rate"], run.get("prefix_dropout", 0.5)) for run in tried}
        assert points == set(itertools.product(rates, own))
        assert len(paths) == len(points)
    for path in kept.glob("fused-16-*"):
        path.unlink()
    left = experiments("three", finished=True).run("reading-times").read_text()
    assert "| fused | 8 |" in left
    assert "| fused | 16 |" not in left
    next(kept.glob("static-8-*")).write_text("{")
    with pytest.raises(FusionLMError, match="is damaged"):
        experiments("four", finished=True).run("reading-times")


def test_dropping_model_drops_in_evaluation_too() -> None:
    from conftest import small_model

    plain = small_model(fusion="concat", prefix_dropout=1.0)
    dropping = DroppingLM(plain.config).eval()
    dropping.load_state_dict(plain.state_dict())
    ids, e = torch.randint(3, 30, (2, 5)), torch.randn(2, 5, plain.config.prefix_size)
    without = plain(ids, prefix_embeds=torch.zeros_like(e)).logits
    assert torch.equal(dropping(ids, prefix_embeds=e).logits, without)
    assert not torch.equal(plain(ids, prefix_embeds=e).logits, without)


def test_regularised_model_is_plain_in_evaluation() -> None:
    from conftest import small_model

    plain = small_model(tie_weights=True, fusion="none", dropout=0.5)
    awd = RegularisedLM(plain.config)
    awd.load_state_dict(plain.state_dict())
    ids = torch.randint(3, 30, (40, 6))
    assert torch.equal(awd.eval()(ids).logits, plain(ids).logits)
    awd.train()
    awd.config.dropout = 0.25
    x = torch.ones(200, 5, 6)
    dropped = awd._drop(x)
    assert torch.equal(dropped, dropped[:, :1].expand_as(x))  # one mask for all positions
    assert abs(float((dropped == 0).float().mean()) - 0.25) < 0.05
    zeros = (awd._recurrent_weights()[0][1] == 0).float().mean()
    assert 0.35 < float(zeros) < 0.65
    awd.config.dropout = 0.0
    rows = awd._embed(torch.arange(30)[None])[0]
    whole = (rows == 0).all(-1) | (rows != 0).all(-1)
    assert bool(whole.all())
    assert awd(ids, labels=ids).loss.requires_grad


def test_embedding_only_sees_no_token() -> None:
    model = EmbeddingOnlyLM(
        FusionLMConfig(vocab_size=30, embedding_size=6, hidden_size=8, prefix_size=5)
    ).eval()
    e = torch.randn(2, 4, 5)
    one, two = (model(torch.randint(3, 30, (2, 4)), prefix_embeds=e).logits for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, model(torch.ones(2, 4, dtype=torch.long), prefix_embeds=-e).logits)
    assert not any("lstm" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fusion"], "give it text with --data"),
        (["fusion", "--data", "nowhere"], "there is no nowhere"),
        (["nonsense"], "unknown experiment 'nonsense'"),
        (["fusion", "--size", "huge"], "unknown size 'huge'"),
        (["fusion", "--data", "DATA"], "left for training, 1,500 are needed"),
        (["fusion", "--data", "DATA", "--corpus", "x"], "no corpus 'x' in --data"),
        (["fusion", "--data", "DATA", "--seeds", "0"], "seeds must be at least 1"),
        (["reading-times", "--data", "DATA/brown"], "no reading times"),
        (["reading-times", "--data", "DATA", "--model", "fusion-lm-small-unfused"], "name two"),
        (["reading-times", "--reading-times", "DATA/brown/a.txt"], "lacks the column story"),
    ],
)
def test_bad_input_is_one_line(
    data: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    arguments = [a.replace("DATA", str(data)) for a in arguments]
    result = CliRunner().invoke(app, ["experiment", *arguments, "--out", str(tmp_path / "o")])
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_page_of_experiments_is_what_the_results_say() -> None:
    """Renewed by `fusion_model.experiments.summary`."""
    from fusion_model.experiments.summary import START, section, update

    docs = Path(__file__).parents[1] / "docs"
    page, folder = (docs / "experiments.md").read_text(), docs / "experiments" / "medium"
    assert START in page
    assert update(page, folder) == page
    assert section(folder) in page


def chosen_runs(runs: Path, arm: str, sentences: int) -> list[dict[str, Any]]:
    """Of the files of finished runs: with seed 0 the one of least dev loss, and the same with other
    seeds."""
    files = [json.loads(path.read_text()) for path in runs.glob("*.json")]
    own = [run for run in files if run["arm"] == arm and run["sentences"] == sentences]

    def settings(run: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in run["definition"].items() if k != "seed"}

    first = [run for run in own if not run["definition"].get("seed")]
    best = min(first, key=lambda run: min((m["dev_loss"] for m in run["epochs"]), default=0))
    return [
        run for run in own if run is best or (run not in first and settings(run) == settings(best))
    ]


def recomputed(runs: Path, arm: str, sentences: int, test: str) -> list[float]:
    """Nats a token with each seed, by nothing but sums."""
    found = []
    for run in chosen_runs(runs, arm, sentences):
        (saved,) = (v for name, v in run["losses"].items() if name.startswith(f"{test}-test-"))
        found.append(sum(saved["nats"]) / sum(saved["tokens"]))
    return found


def cells(table: dict[str, list[list[str]]], *first: str) -> dict[str, str]:
    (row,) = (row for row in table["rows"] if tuple(row[: len(first)]) == first)
    return dict(zip(reversed(table["columns"]), reversed(row), strict=True))  # the first of doubles


def hold_to_losses(report: Path, runs: Path, size: int = 0) -> int:
    """Perplexities and differences in the table of a `data-size` report, or, given the size, of a
    `domain` report; how many."""
    (table,) = json.loads(report.read_text())["tables"]
    checked = 0
    for label, arm in {tuple(row[:2]) for row in table["rows"]}:
        test, sentences = (label, size) if size else ("test", int(label.replace(",", "")))
        shown = cells(table, label, arm)
        own = recomputed(runs, arm, sentences, test)
        assert int(shown["seeds"]) == len(own)
        assert shown["perplexity"].startswith(f"{math.exp(sum(own) / len(own)):.1f} ["), (
            label,
            arm,
        )
        if shown["nats − unfused"]:
            other = recomputed(runs, "unfused", sentences, test)
            difference = sum(own) / len(own) - sum(other) / len(other)
            number = float(shown["nats − unfused"].split()[0].replace("−", "-"))
            assert number == pytest.approx(difference, abs=0.00051)
        checked += 1
    return checked


def test_reports_are_what_the_losses_say(settings: Experiments) -> None:
    report = settings.run("data-size")
    assert hold_to_losses(report.with_name("results.json"), settings.out / "results") == 18


MEDIUM = Path(__file__).parents[1] / "docs" / "experiments" / "medium"


@pytest.mark.parametrize(("name", "size"), [("data-size", 0), ("domain", 20_000)])
def test_committed_reports_are_what_the_committed_losses_say(name: str, size: int) -> None:
    assert hold_to_losses(MEDIUM / name / "results.json", MEDIUM / "runs", size) > 2


def test_committed_reading_times_are_what_the_committed_surprisals_say(shared_data: Path) -> None:
    """Perplexity a word and ΔLL of each model, without the code that wrote the report."""
    folder = shared_data / "natural-stories"
    words = [line.split("\t") for line in (folder / "all_stories.tok").read_text().splitlines()[1:]]
    words.sort(key=lambda row: (int(row[2]), int(row[1])))
    table = [s.split("\t") for s in (folder / "processed_wordinfo.tsv").read_text().splitlines()]
    at = {name: table[0].index(name) for name in ("item", "zone", "meanItemRT")}
    times = {(r[at["item"]], int(r[at["zone"]])): float(r[at["meanItemRT"]]) for r in table[1:]}
    texts = [detokenize(p.read_text(encoding="utf-8")) for p in shared_data.rglob("*.txt")]
    counts = Counter(plain(word) for text in texts for word in text.split())
    total = sum(counts.values()) + len(counts) + 1
    known = np.array([[len(w), math.log((counts[plain(w)] + 1) / total)] for w, _, _ in words])
    # A time stored at a zone is of the word after it.
    y = np.array([times.get((item, int(zone) - 1), math.nan) for _, zone, item in words])
    item = np.array([row[2] for row in words])
    usable = np.flatnonzero(np.isfinite(y) & (item == np.roll(item, 2)))
    usable = usable[usable >= 2]

    def log_likelihood(predictors: np.ndarray) -> float:
        rows = [predictors[usable - back] for back in range(3)]
        x, own, each = sm.add_constant(np.column_stack(rows)), item[usable], 0.0
        for story in set(own):
            fit = sm.OLS(y[usable][own != story], x[own != story]).fit()
            spread = math.sqrt(np.mean(fit.resid**2))
            expected = fit.predict(x[own == story])
            each += stats.norm.logpdf(y[usable][own == story], expected, spread).sum()
        return each / len(usable)

    models = json.loads((MEDIUM / "reading-times" / "results.json").read_text())["data"]["models"]
    base = log_likelihood(known)
    for model in models:
        sentences = int(model["size"].replace(",", ""))
        bits = [
            np.frombuffer(base64.b64decode(run["read"]["bits"]), "<f2").astype(float)
            for run in chosen_runs(MEDIUM / "runs", model["arm"], sentences)
        ]
        gains = [log_likelihood(np.column_stack([known, b])) - base for b in bits]
        assert model["delta"]["value"] == pytest.approx(1000 * np.mean(gains), abs=0.01)
        expected = np.mean([b[usable].mean() for b in bits])
        assert model["bits"]["value"] == pytest.approx(expected, abs=1e-6)
    assert len(models) > 2
