"""Arms are trained, tuned on dev and scored on test; each run has a folder and is done once."""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusion_model import progress
from fusion_model.data.corpus import Corpus
from fusion_model.data.text import Document, read_documents
from fusion_model.encoders.controls import BAGS
from fusion_model.encoders.pretrained import HFEncoder, counted_tokens
from fusion_model.errors import CheckpointError
from fusion_model.experiments.baselines import MODELS
from fusion_model.experiments.corpora import Texts
from fusion_model.experiments.sizes import Size
from fusion_model.files import replacing, write_text
from fusion_model.language_model import FusionLM
from fusion_model.loading import load
from fusion_model.scoring import score_sentences
from fusion_model.training.options import TrainingOptions
from fusion_model.training.run import train


@dataclass(frozen=True)
class Arm:
    """One way to build and train a model.

    Attributes:
        options: fields of `TrainingOptions` that set it apart.
        model: one of `fusion_model.experiments.baselines.MODELS`.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str = "plain"


@dataclass(frozen=True)
class Scores:
    """Losses of one run on one text.

    Attributes:
        nats: of every token, float32 [N].
        sentences: the sentence that each token is of, int32 [N].
        words: of the text.
    """

    nats: np.ndarray
    sentences: np.ndarray
    words: int

    @property
    def mean(self) -> float:
        return float(self.nats.mean(dtype=np.float64))

    @property
    def per_word(self) -> float:
        """Nats a word: comparable across vocabularies."""
        return float(self.nats.sum(dtype=np.float64) / self.words)


@dataclass(frozen=True)
class Run:
    """A finished run; `metrics` has a row an epoch, see `fusion_model.training.run`.

    Attributes:
        dev_loss: of the best epoch, nats a token.
        losses: file of each test, by the name that the study has for it.
    """

    arm: Arm
    folder: Path
    options: TrainingOptions
    metrics: list[dict[str, Any]]
    parameters: int
    dev_loss: float
    losses: Mapping[str, Path]

    def scores(self, name: str) -> Scores:
        """On one of the study's tests."""
        with np.load(self.losses[name]) as saved:
            return Scores(saved["nats"], saved["sentences"], int(saved["words"]))


class Study:
    """Runs of one size on one text, under `out`: `texts/`, `stores/`, `runs/`.

    Args:
        encoder: for all arms that do not name their own.
        seeds: how many, counted from 0; the settings are chosen with seed 0.
    """

    def __init__(self, size: Size, texts: Texts, out: Path, encoder: str, seeds: int) -> None:
        self.size, self.texts, self.out = size, texts, out
        self.encoder, self.seeds = encoder, seeds
        self._done, self._planned, self._trained, self._spent = 0, 0, 0, 0.0

    def results(self, arms: Sequence[Arm]) -> dict[str, list[Run]]:
        """All runs of all arms: for each arm one a seed, with the settings that dev chose."""
        expected = {arm.name: 1 + 2 * len(self.tuned_fields(arm)) for arm in arms}
        self._planned += sum(expected.values()) + len(arms) * (self.seeds - 1)
        found = {}
        for arm in arms:
            before = self._done
            found[arm.name] = [self.tuned(arm)]
            self._planned += self._done - before - expected[arm.name]
        for seed in range(1, self.seeds):  # breadth first: fewer seeds can be reported early
            for arm in arms:
                chosen = found[arm.name][0].options
                settings = {name: getattr(chosen, name) for name in self.size.grids}
                found[arm.name].append(self.run(arm, settings, seed))
        for run in (run for runs in found.values() for run in runs):
            self.score(run)
        return found

    def tuned_fields(self, arm: Arm) -> list[str]:
        """Which of `Size.grids` matter to the arm, and have more than one value."""
        options = self.options(arm, {}, 0)
        fields = [name for name, grid in self.size.grids.items() if len(grid) > 1]
        sees_e = options.fusion != "none" and options.encoder != "zeros"
        if not sees_e or options.prefix_dropout_schedule != "constant":
            fields = [name for name in fields if name != "prefix_dropout"]
        return fields

    def tuned(self, arm: Arm) -> Run:
        """The arm with seed 0 and the settings that are best on dev.

        From the middle of every grid, one field after the other: a step up while dev gains by
        it, or else down. So a chosen value is better than both its neighbours, unless it lies
        at the edge of its grid.
        """
        settings = {name: grid[(len(grid) - 1) // 2] for name, grid in self.size.grids.items()}
        best = self.run(arm, settings, 0)
        for name in self.tuned_fields(arm):
            grid = self.size.grids[name]
            start = grid.index(settings[name])
            for step in (1, -1):
                at = start + step
                while 0 <= at < len(grid):
                    run = self.run(arm, settings | {name: grid[at]}, 0)
                    if run.dev_loss >= best.dev_loss:
                        break
                    best, at = run, at + step
                settings[name] = getattr(best.options, name)
                if settings[name] != grid[start]:
                    break
        return best

    def options(self, arm: Arm, settings: Mapping[str, float], seed: int) -> TrainingOptions:
        """The training of an arm; `settings` by field of `TrainingOptions`."""
        fields: dict[str, Any] = {"encoder": self.encoder, "split": "lines", "seed": seed}
        return TrainingOptions(
            (str(self.texts.train),),
            (str(self.texts.dev),),
            **self.size.training | fields | dict(settings) | dict(arm.options),
        )

    def run(self, arm: Arm, settings: Mapping[str, float], seed: int) -> Run:
        """One run, from its folder if it was done before."""
        options = self.options(arm, settings, seed)
        # What differs from the defaults: options that come later leave old runs valid.
        own = {
            f.name: getattr(options, f.name)
            for f in dataclasses.fields(options)
            if f.name not in ("train_file", "dev_file") and getattr(options, f.name) != f.default
        }
        saved = {"model": arm.model, **own, "text": self.texts.train.name}
        digest = hashlib.sha256(json.dumps(saved, sort_keys=True).encode()).hexdigest()[:10]
        label = "".join(c if c.isalnum() else "-" for c in arm.name)
        folder = next(iter((self.out / "runs").glob(f"*-{digest}")), None)
        folder = folder or self.out / "runs" / f"{label}-seed{seed}-{digest}"
        self._done += 1
        if not (folder / "result.json").exists():
            self._announce(arm.name, options)
            began = time.monotonic()
            train(options, folder, self.store(options), MODELS[arm.model])
            self._finish(folder, arm, options, saved)
            self._spent += time.monotonic() - began
        return self._read(folder, arm, options)

    def score(self, run: Run) -> None:
        """Losses on all tests, once; settings that dev did not choose need none."""
        for name, path in self.texts.tests.items():
            if run.losses[name].exists():
                continue
            lm = self.open(run)
            documents, corpus = _read(path, lm, run.options)
            with lm.open_store(self.store(run.options)) as store:
                scores = score_sentences(lm, lm.encode_corpus(corpus, store))
            with replacing(run.losses[name]) as temporary:
                np.savez_compressed(
                    temporary,
                    nats=np.concatenate([s.tokens for s in scores]),
                    sentences=np.repeat(np.arange(len(scores)), [len(s.tokens) for s in scores]),
                    words=sum(len(s.split()) for d in documents for s in d.sentences),
                    characters=corpus.characters,
                )

    def encoding(self, run: Run) -> tuple[int, float]:
        """Vectors that the runs of this text and store encoded, and the seconds it took them.

        The first such run fills the store for all others.
        """
        wanted = (self.store(run.options).name, self.texts.train.name)
        vectors, seconds = 0, 0.0
        for path in (self.out / "runs").glob("*/encoding.jsonl"):
            result = path.with_name("result.json")
            saved = json.loads(result.read_text()) if result.exists() else {}
            if saved and (saved["store"], saved["settings"]["text"]) == wanted:
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                vectors += sum(e["vectors"] for e in lines)
                seconds += sum(e["seconds"] for e in lines)
        return vectors, seconds

    def store(self, options: TrainingOptions) -> Path:
        """Where embeddings are kept, shared by all runs that need the same ones."""
        parts = [options.encoder, options.view, options.policy]
        if options.encoder in BAGS:  # fitted to the training text
            parts.append(Path(options.train_file[0]).name)
        else:
            parts += [options.pooling, options.encoder_dtype]
        plain = "_".join(parts).replace("/", "-").replace(":", "-")
        return self.out / "stores" / plain

    def _announce(self, name: str, options: TrainingOptions) -> None:
        left = ""
        if self._trained:
            minutes = self._spent / self._trained * (self._planned - self._done + 1) / 60
            left = f", about {minutes:.0f} min left"
        self._trained += 1
        on_e = f", on e {options.prefix_dropout:g}" if options.fusion != "none" else ""
        progress.note(
            f"run {self._done} of about {self._planned}{left}: {name}, learning rate "
            f"{options.learning_rate:g}, dropout {options.dropout:g}{on_e}, seed {options.seed}"
        )

    def _finish(
        self, folder: Path, arm: Arm, options: TrainingOptions, settings: dict[str, Any]
    ) -> None:
        model = MODELS[arm.model].from_pretrained(folder)
        result = {
            "arm": arm.name,
            "settings": settings,
            "parameters": sum(p.numel() for p in model.parameters()),
            "store": self.store(options).name if options.fusion != "none" else "",
        }
        write_text(folder / "result.json", json.dumps(result, indent=1) + "\n")
        for checkpoint in folder.glob("checkpoint-*"):  # nothing is left to go on with
            shutil.rmtree(checkpoint)

    def _read(self, folder: Path, arm: Arm, options: TrainingOptions) -> Run:
        try:
            result = json.loads((folder / "result.json").read_text())
            metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
            parameters, best = int(result["parameters"]), min(m["dev_loss"] for m in metrics)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} is damaged ({error}): delete it to repeat") from None
        # The text's folder has a hash in its name: another text never meets these losses.
        losses = {
            name: folder / f"losses-{text.name}.npz" for name, text in self.texts.tests.items()
        }
        return Run(arm, folder, options, metrics, parameters, best, losses)

    def open(self, run: Run) -> FusionLM:
        """The trained model, with its encoder; on a GPU if there is one, as training is."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype, kind = run.options.encoder_dtype, MODELS[run.arm.model]
        return load(str(run.folder), device=device, encoder_dtype=dtype, model_class=kind)

    def encoder_work(self, run: Run) -> float:
        """Tokens that go through the whole encoder for each token of the test text: one that
        goes through half of the layers counts half. Duplicate prefixes are dropped."""
        lm = self.open(run)
        assert lm.planner is not None
        encoder = lm.planner.encoder
        if not isinstance(encoder, HFEncoder) or not encoder.deepest:
            return 0.0
        _, corpus = _read(self.texts.tests["test"], lm, run.options)
        lm.encode_corpus(Corpus(corpus.sentences[:1], [True], 1))  # tries its own pass first
        with counted_tokens(encoder) as tokens:
            lm.encode_corpus(corpus)
        return sum(tokens) * encoder.deepest / encoder.depth / sum(corpus.positions)


def _read(path: Path, lm: FusionLM, options: TrainingOptions) -> tuple[list[Document], Corpus]:
    documents = read_documents([str(path)], "lines")
    return documents, Corpus.from_documents(documents, lm.tokenizer, options.max_tokens)
