"""Every experiment, end to end at toy size; they resume, and say what they lack."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from typer.testing import CliRunner

from fusion_model import FusionLMConfig
from fusion_model.cli import app
from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document, read_documents
from fusion_model.experiments import study as study_module
from fusion_model.experiments.arms import arms_of
from fusion_model.experiments.baselines import EmbeddingOnlyLM, RegularisedLM
from fusion_model.experiments.comparisons import resized
from fusion_model.experiments.corpora import Texts, find_corpora, write_test, write_texts
from fusion_model.experiments.runner import EXPERIMENTS, Experiments
from fusion_model.experiments.sizes import Size, size_by_name
from fusion_model.experiments.study import Arm, Run, Study
from fusion_model.model import FusionLMForCausalLM
from fusion_model.prefixes.store import digest

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
    data_sizes=(8, 16),
)
STORIES = [SENTENCES[:8], SENTENCES[2:8], SENTENCES[3:7] + SENTENCES[:2]]


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
        latex = (report.parent / f"{table['name']}.tex").read_text()
        assert latex.count(r"\\") == 1 + len(table["rows"])
        assert name == "examples" or latex.isascii()
    for figure in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (report.parent / figure).read_bytes().startswith(b"\x89PNG")
        assert (report.parent / figure).with_suffix(".pdf").stat().st_size > 1000
    assert list(report.parent.glob("*.png"))


def without_times(report: Path) -> str:
    """A report but for its table of seconds."""
    text, rest = report.read_text().split("| arm | prefixes encoded")
    return text + rest[rest.index("Wall-clock time") :]


def test_interrupted_experiment_ends_the_same(
    settings: Experiments, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped during the second arm, then run again: as if never stopped, nothing done twice."""
    whole = without_times(settings.run("schedule"))
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
    assert without_times(other.run("schedule")) == whole
    assert len(calls) == 7  # six arms, one of them begun twice
    again = Experiments(TOY, [str(data)], tmp_path / "other", 1, settings.encoder)
    assert without_times(again.run("schedule")) == whole
    assert len(calls) == 7


class Landscape(Study):
    """A study whose runs have the dev loss of a formula, and are counted."""

    def __init__(self, size: Size, out: Path, best: dict[str, float]) -> None:
        texts = Texts("made", out / "train", out / "dev", {})
        super().__init__(size, texts, out, "minilm", 1)
        self.best, self.tried = best, []

    def run(self, arm: Arm, settings: Mapping[str, float], seed: int) -> Run:
        self.tried.append(tuple(settings.values()))
        options = self.options(arm, settings, seed)
        away = [math.log(getattr(options, name) / at) ** 2 for name, at in self.best.items()]
        return Run(arm, self.out, options, [], 0, sum(away), {})


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
    study = Experiments(size, [str(data)], tmp_path / "out", seeds=2).study
    arm = Arm("unfused", {"fusion": "none"})
    runs = study.results([arm])[arm.name]
    chosen = [run.options for run in runs]
    assert [o.learning_rate for o in chosen] == [0.02, 0.02]
    assert [o.seed for o in chosen] == [0, 1]
    assert chosen[0].dropout == chosen[1].dropout
    settings = [{"learning_rate": 0.02, "dropout": p, "prefix_dropout": 0.5} for p in (0.1, 0.9)]
    losses = [study.run(arm, s, 0).dev_loss for s in settings]
    assert chosen[0].dropout == (0.1, 0.9)[int(np.argmin(losses))]
    assert runs[0].dev_loss == min(m["dev_loss"] for m in runs[0].metrics) == min(losses)
    folders = list((tmp_path / "out" / "runs").iterdir())
    assert len(folders) == 4
    assert sum(bool(list(f.glob("losses-*.npz"))) for f in folders) == 2


def test_encoding_is_timed_once_for_all_runs(data: Path, tmp_path: Path, bert_folder: Path) -> None:
    study = Experiments(TOY, [str(data)], tmp_path / "out", 2, str(bert_folder)).study
    arm = Arm("fused", {"fusion": "concat", "pooling": "mean"})
    runs = study.results([arm])[arm.name]
    lm = study.open(runs[0])
    corpora = [
        Corpus.from_documents(read_documents([str(folder)], "lines"), lm.tokenizer, 40)
        for folder in (study.texts.train, study.texts.dev)
    ]
    inputs = {digest(i.to_bytes()) for c in corpora for i in lm.planner.inputs(c.sentences)}
    vectors, seconds = study.encoding(runs[0])
    assert vectors == len(inputs) == study.encoding(runs[1])[0]
    assert seconds > 0
    assert len(list((tmp_path / "out" / "runs").glob("*/encoding.jsonl"))) == 1
    assert all(m["seconds"] > 0 for run in runs for m in run.metrics)


def test_less_text_is_trained_on_for_as_many_steps(data: Path, tmp_path: Path) -> None:
    experiments = Experiments(TOY, [str(data)], tmp_path / "out", 1)
    study, documents = experiments.study, experiments.corpora["brown"]
    part = resized(study, 4, documents)
    assert part.size.sentences == 4
    assert part.size.training["epochs"] == 2 * 16 // 4
    assert part.size.training["patience"] == 3 * 16 // 4
    assert resized(study, 16, documents).size.training["epochs"] == 2
    assert part.texts.tests == study.texts.tests


def test_losses_of_another_test_text_are_not_taken(data: Path, tmp_path: Path) -> None:
    """Another test text under the same name, in the same folder: scored, not read back."""
    study = Experiments(TOY, [str(data)], tmp_path / "out", 1).study
    arm = Arm("unfused", {"fusion": "none"})
    [run] = study.results([arm])[arm.name]
    other = Document("o", ["Another text altogether.", "It is short."])
    study.texts = dataclasses.replace(
        study.texts, tests={"test": write_test("other", [other], 2, study.texts.train.parent)}
    )
    [again] = study.results([arm])[arm.name]
    assert again.folder == run.folder
    assert again.scores("test").words == 6 != run.scores("test").words


def test_all_leaves_out_what_the_data_lack(data: Path, tmp_path: Path) -> None:
    everything = Experiments(TOY, [str(data)], tmp_path)
    assert everything.available() == list(EXPERIMENTS)
    little = Experiments(TOY, [str(data / "letters")], tmp_path)
    assert set(EXPERIMENTS) - set(little.available()) == {"reading-times", "domain"}


@pytest.mark.parametrize("size", [TOY, size_by_name("small"), size_by_name("paper")], ids=str)
def test_baselines_have_the_parameters_of_concat(size: Size) -> None:
    arms = {a.name: a for a in arms_of("fusion", size, 384, 6)}
    counts = {}
    for name in ("concat", "unfused, wider", "unfused, AWD", "concat, AWD"):
        fields = size.training | dict(arms[name].options)
        names = ("vocab_size", "embedding_size", "hidden_size", "fusion", "tie_weights")
        chosen = {n: fields[n] for n in names if n in fields}
        with torch.device("meta"):
            model = FusionLMForCausalLM(FusionLMConfig(**chosen, prefix_size=3 * 384))
        counts[name] = sum(p.numel() for p in model.parameters())
    concat = counts.pop("concat")
    for count in counts.values():
        assert concat <= count < 1.01 * concat + 2000


def test_texts_are_nested_and_disjoint(data: Path, tmp_path: Path) -> None:
    corpora = find_corpora([str(data)])
    assert sorted(corpora) == ["brown", "letters"]
    numbered = [
        type(d)(d.name, [f"{d.name} {i}" for i in range(len(d.sentences))])
        for d in corpora["brown"]
    ]

    def lines(folder: Path) -> set[str]:
        return {line for f in folder.glob("*.txt") for line in f.read_text().splitlines()}

    small, large = (write_texts("brown", numbered, (n, 7, 9), tmp_path / "t") for n in (10, 20))
    assert small.dev == large.dev
    assert small.tests == large.tests
    assert len(lines(small.train)) == 10
    assert len(lines(large.dev)) == 7
    assert lines(small.train) < lines(large.train)
    assert not lines(large.train) & (lines(large.dev) | lines(large.tests["test"]))


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
        (["fusion", "--data", "DATA"], "sentences, 2,700 are needed"),
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
    """Renew it: python -m fusion_model.experiments.summary docs/experiments docs/experiments.md"""
    from fusion_model.experiments.summary import START, section, update

    docs = Path(__file__).parents[1] / "docs"
    page, folder = (docs / "experiments.md").read_text(), docs / "experiments"
    assert START in page
    assert update(page, folder) == page
    assert section(folder) in page
    assert "null result" in section(folder)
