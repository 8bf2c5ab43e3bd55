"""One experiment by name, from data to report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fusion_model import progress
from fusion_model.data.text import Document
from fusion_model.encoders import load_encoder
from fusion_model.encoders.pretrained import HFEncoder
from fusion_model.errors import FusionLMError
from fusion_model.experiments import comparisons, examples
from fusion_model.experiments.arms import NGRAMS, arms_of
from fusion_model.experiments.corpora import (
    MIXTURE,
    choose_corpus,
    find_corpora,
    find_reading_times,
    write_texts,
)
from fusion_model.experiments.losses import word_bits
from fusion_model.experiments.reading import experiment as reading_times
from fusion_model.experiments.reading.data import ReadingTimes, read_natural_stories, read_tsv
from fusion_model.experiments.report import Findings
from fusion_model.experiments.sizes import Size
from fusion_model.experiments.study import Study
from fusion_model.experiments.tables import describe
from fusion_model.files import locked, write_text
from fusion_model.language_model import FusionLM
from fusion_model.loading import load
from fusion_model.training.options import TrainingOptions

SCORING = ("reading-times", "examples")
EXPERIMENTS = (*comparisons.TITLES, *SCORING)


@dataclass
class Experiments:
    """Settings that all experiments of one output folder share.

    Args:
        models: for `reading-times` and `examples`: trained models, the first is what the
            others are compared with. None given: arms trained here, one model a seed.
        reading_times: a corpus as TSV, instead of Natural Stories in `data`.
        results: folder of finished runs (default: `out/results`).
        finished: report what is finished, train nothing.
    """

    size: Size
    data: Sequence[str]
    out: Path
    seeds: int = 3
    encoder: str = "minilm"
    corpus: str | None = None
    models: Sequence[str] = ()
    reading_times: Path | None = None
    results: Path | None = None
    finished: bool = False
    _studies: dict[tuple[int, bool], Study] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise FusionLMError("seeds must be at least 1")
        import statsmodels  # noqa: F401  # missing, it should be missed before hours of training

    @cached_property
    def corpora(self) -> dict[str, list[Document]]:
        """The texts of `data`, read once; a folder of nothing but reading times has none."""
        stories = find_reading_times(self.data)
        only = stories if stories and not any(stories.rglob("*.txt")) else None
        return find_corpora([d for d in self.data if Path(d) != only])

    @staticmethod
    def _note(encoders: set[str]) -> str:
        """What stands in every table."""
        if encoders == {"minilm"}:
            return "Encoder: all-MiniLM-L6-v2, which stands in for the paper's BERT."
        return f"Encoder: {', '.join(sorted(encoders)) or 'none'}."

    def study_of(self, sentences: int, domains: bool = False) -> Study:
        """Training arms on so many sentences of the corpus.

        With fewer, epochs and patience grow: arms differ in what they learn, not in how fast.

        Args:
            domains: other corpora are tests, too.
        """
        if (sentences, domains) in self._studies:
            return self._studies[sentences, domains]
        size, training = self.size, self.size.training
        name = MIXTURE if size.mixed else choose_corpus(self.corpora, self.corpus)
        epochs = size.data_sizes.get(sentences, training["epochs"])
        patience = training.get("patience", TrainingOptions.patience) * epochs / training["epochs"]
        training = {**training, "epochs": epochs, "patience": round(patience)}
        texts = write_texts(self.corpora, name, size, sentences, self.out / "texts")
        if not domains and not size.mixed:
            texts = replace(texts, tests={"test": texts.tests["test"]})
        tuner = None
        if size.tuned_at not in (0, sentences):
            tuner = self.study_of(size.tuned_at, domains)
        study = Study(
            replace(size, sentences=sentences, training=training),
            texts,
            self.out,
            self.encoder,
            self.seeds,
            self.results or self.out / "results",
            read=self.read.documents() if self.read else (),
            tuner=tuner,
            finished=self.finished,
        )
        return self._studies.setdefault((sentences, domains), study)

    def run(self, name: str) -> Path:
        """The report of an experiment, `out/NAME/report.md`.

        Raises:
            FusionLMError: unknown; another process works in `out`; bad data.
        """
        if name not in EXPERIMENTS:
            raise FusionLMError(
                f"unknown experiment {name!r}: choose one of {', '.join(EXPERIMENTS)}, or all"
            )
        self._claim()
        with locked(self.out / ".lock", str(self.out)):
            findings = self._findings(name)
            if name in SCORING and self.models:
                findings.title += ", models trained beforehand"
            return findings.write(self.out / name)

    def _findings(self, name: str) -> Findings:
        if name == "reading-times":
            return self._reading_times()
        if name == "examples":
            return examples.run(*self._models(name))
        arms = arms_of(name, self.size, *self._encoder_shape())
        sizes = list(self.size.data_sizes) if name == "data-size" else [self.size.sentences]
        studies = {n: self.study_of(n, name == "domain") for n in sizes}
        return comparisons.run(name, studies, arms, self._note({self.encoder}))

    def _claim(self) -> None:
        """A folder is of one size, encoder and corpus: its reports would else be overwritten."""
        wanted = {"size": self.size.name, "encoder": self.encoder, "corpus": self.corpus}
        path = self.out / "settings.json"
        if not path.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(wanted, indent=1) + "\n")
        elif (found := path.read_text(errors="replace")) != json.dumps(wanted, indent=1) + "\n":
            raise FusionLMError(
                f"{self.out} holds experiments with other settings ({' '.join(found.split())}): "
                "choose another --out, or repeat the settings"
            )

    def available(self) -> list[str]:
        """The experiments that `all` runs: those that the data allow."""
        left_out = []
        if self.reading_times is None and find_reading_times(self.data) is None:
            left_out.append("reading-times")
        if sum(map(len, self.corpora.values())) == 1:
            left_out.append("domain")
        for name in left_out:
            progress.note(f"left out: {name}, for which --data holds too little")
        return [name for name in EXPERIMENTS if name not in left_out]

    @cached_property
    def read(self) -> ReadingTimes | None:
        """The text that people read, with their times."""
        if self.reading_times is not None:
            return read_tsv(self.reading_times)
        folder = find_reading_times(self.data)
        return None if folder is None else read_natural_stories(folder)

    def _reading_times(self) -> Findings:
        if self.read is None:
            raise FusionLMError(
                "no reading times: --data needs a folder natural-stories with all_stories.tok and "
                "processed_wordinfo.tsv, or bring a corpus with --reading-times FILE.tsv (columns "
                "story, word, time)"
            )
        found: dict[tuple[str, str], np.ndarray] = {}
        if self.models:
            models, note = self._models("reading-times")
            documents = self.read.documents()
            for name, (lm,) in models.items():
                progress.note(f"surprisals: {name}")
                found[name, "as it was"] = word_bits(lm, documents)[None]
            return reading_times.run(self.read, found, self.corpora, note)
        sizes = list(self.size.data_sizes)
        for sentences in sizes:
            study = self.study_of(sentences)
            arms = arms_of("reading-times", self.size, *self._encoder_shape())
            arms = [arm for arm in arms if arm.model not in NGRAMS]
            for arm, runs in study.results(arms).items():
                found[arm, f"{sentences:,}"] = np.stack([run.surprisal() for run in runs])
        trained = [n for n in sizes if any(size == f"{n:,}" for _, size in found)]
        note = describe(study, self._note({self.encoder}), trained)
        return reading_times.run(self.read, found, self.corpora, note)

    def _encoder_shape(self) -> tuple[int, int]:
        """Width and layers."""
        encoder = load_encoder(self.encoder, "cls")
        assert isinstance(encoder, HFEncoder)
        return encoder.dim, encoder.depth

    def _models(self, name: str) -> tuple[Mapping[str, Sequence[FusionLM]], str]:
        """Models by name, one a seed, the reference first; and what the report says of them."""
        names = list(self.models)
        if not names:
            study = self.study_of(self.size.sentences)
            arms = arms_of(name, study.size, *self._encoder_shape())
            results = study.results([arm for arm in arms if arm.model not in NGRAMS])
            note = describe(study, self._note({self.encoder}))
            return {a: [study.open(r) for r in runs] for a, runs in results.items()}, note
        loaded = {Path(n).name: [load(n, encoder_dtype="auto")] for n in names}
        if len(loaded) < 2:
            raise FusionLMError(
                f"{name} compares models: name two with --model, the reference first"
            )
        note = self._note({str(lm.model.config.encoder) for (lm,) in loaded.values() if lm.planner})
        return loaded, f"Models trained beforehand: {', '.join(loaded)}. {note}"
