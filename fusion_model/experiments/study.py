"""Arms are trained, tuned on dev and scored on test; what a run found is a small file.

A file of `results` holds a finished run, named by a hash of all that defines it: settings, texts
and vocabulary, and sealed by another of what it says. It can be committed, and whoever has it need
not train that arm again.
"""

import base64
import dataclasses
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from fusion_model import progress
from fusion_model.data.text import Document, read_documents
from fusion_model.data.tokenizer import encode_sentences, train_bpe
from fusion_model.devices import resolve_device, resolve_dtype
from fusion_model.encoders.controls import BAGS
from fusion_model.encoders.policies import AUTO
from fusion_model.errors import CheckpointError
from fusion_model.experiments.arms import NGRAMS, Arm
from fusion_model.experiments.baselines import MODELS, DroppingLM
from fusion_model.experiments.corpora import Texts
from fusion_model.experiments.losses import by_document, read_test, successive_cosine, word_bits
from fusion_model.experiments.ngrams import KneserNey
from fusion_model.experiments.sizes import Size
from fusion_model.experiments.tuning import Settings, Unfinished, best_of, search
from fusion_model.language_model import FusionLM
from fusion_model.loading import load
from fusion_model.schema import read_json, read_lines, write_json
from fusion_model.scoring import score_sentences
from fusion_model.training.claim import claim_folder
from fusion_model.training.options import TrainingOptions
from fusion_model.training.run import Epoch, autocast, train

# Of `TrainingOptions`, when the first results were kept.
ONCE_DEFAULT = {"policy": "every", "pooling": "static+mean"}


@dataclass(frozen=True)
class Run:
    """A run; `result` is what its file holds.

    Attributes:
        metrics: a row an epoch, of `train_loss` and `dev_loss`, nats a token.
        dev_loss: of the best epoch.
    """

    arm: Arm
    options: TrainingOptions
    path: Path
    result: dict[str, Any]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return list(self.result["epochs"])

    @property
    def best(self) -> dict[str, Any]:
        """The epoch of least dev loss; without any, a model that only counts."""
        return min(self.metrics, key=lambda m: float(m["dev_loss"]), default={"epoch": 0})

    @property
    def dev_loss(self) -> float:
        return float(self.best["dev_loss"])

    def key(self, text: Path) -> str:
        """What the losses on a text are kept by."""
        return text.name + "-shuffled" * self.arm.misled

    def scores(self, text: Path) -> dict[str, np.ndarray]:
        """On a text that it was scored on, by document: `nats`, `tokens` and `words`, each [D]."""
        return {name: np.array(v) for name, v in self.result["losses"][self.key(text)].items()}

    def surprisal(self) -> np.ndarray:
        """Bits of every word of the text that people read, [M]."""
        packed = base64.b64decode(self.result["read"]["bits"])
        return np.frombuffer(packed, dtype="<f2").astype(float)


@dataclass(eq=False)
class Study:
    """Runs of one size on one text, under `out`: `texts/`, `stores/`, `runs/`.

    Args:
        encoder: for all arms that do not name their own.
        seeds: how many, counted from 0; the settings are chosen with seed 0.
        kept: folder of finished runs.
        read: documents whose words get surprisals, for reading times.
        tuner: the study that chooses the settings; this one by default.
        finished: train nothing, only tell what is there.
    """

    size: Size
    texts: Texts
    out: Path
    encoder: str
    seeds: int
    kept: Path
    read: Sequence[Document] = ()
    tuner: Optional["Study"] = None
    finished: bool = False

    def results(self, arms: Sequence[Arm]) -> dict[str, list[Run]]:
        """All runs of all arms, scored: for each arm one a seed, with the settings that dev chose;
        breadth first, so that an interrupted study has fewer seeds of all arms."""
        found: dict[str, list[Run]] = {}
        for seed in range(self.seeds):
            for arm in arms:
                if (seed and arm.model in NGRAMS) or 0 < arm.most < self.size.sentences:
                    continue
                try:
                    run = self.tuned(arm, arms)
                    if seed:
                        run = self.run(arm, self.settings(run), seed)
                    run = self.scored(run)
                except Unfinished:
                    continue
                found.setdefault(arm.name, []).append(run)
        return found

    def settings(self, run: Run) -> Settings:
        """Of the grids, what the run was made with."""
        return {name: getattr(run.options, name) for name in self.size.grids}

    def tuned_fields(self, arm: Arm) -> list[str]:
        """Which of `Size.grids` matter to the arm, and have more than one value."""
        options = self.options(arm, {}, 0)
        fields = [name for name, grid in self.size.grids.items() if len(grid) > 1]
        sees_e = options.fusion != "none" and options.encoder != "zeros"
        if not sees_e or options.prefix_dropout_schedule != "constant":
            fields = [name for name in fields if name != "prefix_dropout"]
        return fields

    def tuned(self, arm: Arm, arms: Sequence[Arm] = ()) -> Run:
        """The arm with seed 0 and the settings that are best on dev.

        With a tuner, the settings that it chose for any of the arms are tried for each of them,
        with every dropout on e: which are best depends on how much text there is, and so would a
        comparison whose settings were frozen.

        Args:
            arms: of the comparison.
        """
        middle = {name: grid[(len(grid) - 1) // 2] for name, grid in self.size.grids.items()}
        if arm.model in NGRAMS:
            return self.run(arm, middle, 0)

        def run(settings: Settings) -> Run:
            return self.run(arm, settings, 0)

        if self.tuner is None:
            return search(run, middle, {n: self.size.grids[n] for n in self.tuned_fields(arm)})
        if arm.like is not None:
            return run(self.settings(self.tuned(arm.like, arms)))
        dropouts = self.size.prefix_dropouts
        if "prefix_dropout" not in self.tuned_fields(arm):
            dropouts = (middle["prefix_dropout"],)
        points: list[Settings] = []
        for settings, dropout in itertools.product(self.tuner.chosen([arm, *arms]), dropouts):
            point = {**settings, "prefix_dropout": dropout}
            points += [point] * (point not in points)
        return best_of(run, points)

    def chosen(self, arms: Sequence[Arm]) -> list[Settings]:
        """What dev chose for these arms, each once; of those that are there."""
        found: list[Settings] = []
        for arm in arms:
            if arm.model not in NGRAMS and arm.like is None:
                with suppress(Unfinished):
                    settings = self.settings(self.tuned(arm))
                    found += [settings] * (settings not in found)
        return found

    def options(self, arm: Arm, settings: Mapping[str, float], seed: int) -> TrainingOptions:
        """The training of an arm; `settings` by field of `TrainingOptions`."""
        fields: dict[str, Any] = {"encoder": self.encoder, "policy": "every"}
        fields |= {"split": "lines", "seed": seed}
        return TrainingOptions(
            (str(self.texts.train),),
            (str(self.texts.dev),),
            **self.size.training | fields | dict(settings) | dict(arm.options),
        )

    def run(self, arm: Arm, settings: Mapping[str, float], seed: int) -> Run:
        """One run, from its file if it was done before."""
        options = self.options(arm, settings, seed)
        # What differs from the defaults: options that come later leave old runs valid.
        own = {
            f.name: getattr(options, f.name)
            for f in dataclasses.fields(options)
            if f.name not in ("train_file", "dev_file")
            and getattr(options, f.name) not in (f.default, ONCE_DEFAULT.get(f.name))
        }
        texts = [p.name for p in (self.texts.train, self.texts.dev, self.texts.vocabulary)]
        if own.get("precision") == AUTO:  # as it was called then; what it came to is in the result
            own["precision"] = "bfloat16"
        if arm.model in NGRAMS:
            own = {name: own.get(name) for name in ("vocab_size", "max_tokens")}
        definition = {"model": arm.model, **own, "texts": texts}
        digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:10]
        label = "".join(c if c.isalnum() else "-" for c in arm.name)
        name = f"{label}-{self.size.sentences}-seed{seed}-{digest}"
        path = next(iter(self.kept.glob(f"*-{digest}.json")), self.kept / f"{name}.json")
        run = Run(arm, options, path, {"definition": definition, "epochs": [], "losses": {}})
        if path.exists():
            try:
                run.result.update(read_json(path, dict[str, Any], sealed=True))
                if run.result["definition"] != definition:
                    raise ValueError("it is of another run")
            except (OSError, ValueError) as error:
                raise CheckpointError(
                    f"{path} is damaged ({error}): restore it, or delete it to train that arm again"
                ) from None
        elif arm.model not in NGRAMS:
            self._train(run)
        return run

    def folder(self, run: Run) -> Path:
        """Where it is trained."""
        return self.out / "runs" / run.path.stem

    def _train(self, run: Run) -> None:
        """Train, or go on; the model is then in its folder, and its file says how it went."""
        if self.finished:
            raise Unfinished
        folder, options = self.folder(run), run.options
        done, shown = len(list(self.kept.glob("*.json"))), self.settings(run).items()
        progress.note(
            f"run {done + 1}: {run.arm.name}, {self.size.sentences:,} sentences, seed "
            f"{options.seed}, {', '.join(f'{name} {value:g}' for name, value in shown)}"
        )
        claim_folder(options, folder, True)
        self.tokenizer.save_pretrained(folder)
        train(options, folder, self.store(options), MODELS[run.arm.model])
        model = MODELS[run.arm.model].from_pretrained(folder)
        metrics = read_lines(folder / "metrics.jsonl", Epoch)
        names = ("epoch", "train_loss", "dev_loss", "prefix_dropout")
        run.result["parameters"] = sum(p.numel() for p in model.parameters())
        run.result["precision"] = str(resolve_dtype(options.precision, model.device))[6:]
        run.result["epochs"] = [{name: m[name] for name in names} for m in metrics]
        self._keep(run)
        for checkpoint in folder.glob("checkpoint-*"):  # nothing is left to go on with
            shutil.rmtree(checkpoint)

    def _keep(self, run: Run) -> None:
        self.kept.mkdir(parents=True, exist_ok=True)
        saved = {"arm": run.arm.name, "sentences": self.size.sentences, **run.result}
        write_json(run.path, saved, indent=None)

    @cached_property
    def tokenizer(self) -> Any:
        """Of the largest training text, the same for all sizes."""
        documents = read_documents([str(self.texts.vocabulary)], "lines")
        sentences = [s for d in documents for s in d.sentences]
        return train_bpe(sentences, int(self.size.training["vocab_size"]))

    def scored(self, run: Run) -> Run:
        """The run with its losses on all tests, and its surprisals of what was read: the only
        place where test texts are opened, for runs that dev has chosen."""
        losses = run.result["losses"]
        own_test, *_ = tests = list(self.texts.tests.values())
        missing = [path for path in tests if run.key(path) not in losses]
        counts = run.arm.model in NGRAMS
        unread = bool(self.read) and not counts and "read" not in run.result
        if not missing and not unread:
            return run
        if self.finished:
            raise Unfinished
        if counts:
            self._count(run, missing)
        else:
            lm = self.open(run)
            if run.arm.misled:
                lm.shuffle = "corpus"
            with torch.no_grad(), autocast(run.options.precision, lm.model.device):
                for path in missing:
                    documents, corpus = read_test(path, lm.tokenizer, run.options)
                    with lm.open_store(self.store(run.options)) as store:
                        batches = lm.encode_corpus(corpus, store)
                        scores = score_sentences(lm, batches)
                        if path == own_test and not run.arm.misled:
                            run.result["cosine"] = successive_cosine(batches)
                    nats = [s.tokens for s in scores]
                    losses[run.key(path)] = by_document(documents, corpus, nats)
            if unread:  # in float32
                bits = word_bits(lm, self.read).astype("<f2").tobytes()
                run.result["read"] = {"bits": base64.b64encode(bits).decode()}
        self._keep(run)
        return run

    def _count(self, run: Run, tests: Iterable[Path]) -> None:
        """A model that counts."""
        limit = run.options.max_tokens
        documents = read_documents([str(self.texts.train)], "lines")
        sentences = [s for d in documents for s in d.sentences]
        ids = encode_sentences(self.tokenizer, sentences, limit)
        model = KneserNey(ids, len(self.tokenizer), NGRAMS[run.arm.model])
        run.result["parameters"] = model.grams
        for path in tests:
            texts, corpus = read_test(path, self.tokenizer, run.options)
            nats = model.nats(corpus.sentences)
            parts = np.split(nats, np.cumsum(corpus.positions)[:-1])
            run.result["losses"][run.key(path)] = by_document(texts, corpus, parts)

    def store(self, options: TrainingOptions) -> Path:
        """Where embeddings are kept, shared by all runs that need the same ones."""
        fitted = options.encoder in BAGS  # to the training text
        text = Path(options.train_file[0]).name
        own = [text] if fitted else [options.pooling, options.encoder_dtype]
        plain = "_".join([options.encoder, options.view, options.policy, *own])
        plain = plain.replace("/", "-").replace(":", "-")
        return self.out / "stores" / plain

    def open(self, run: Run) -> FusionLM:
        """The trained model, with its encoder; where only its file is here, trained again."""
        folder = self.folder(run)
        if not (folder / "model.safetensors").exists() or list(folder.glob("checkpoint-*")):
            self._train(run)
        dtype, kind = run.options.encoder_dtype, MODELS[run.arm.model]
        lm = load(str(folder), device=resolve_device("auto"), encoder_dtype=dtype, model_class=kind)
        if kind is DroppingLM:
            lm.model.config.prefix_dropout = run.best["prefix_dropout"]
        return lm
