"""Self-paced reading times and the text they are of: Natural Stories, or any corpus as TSV."""

import csv
import math
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion_model.data.text import Document, split_sentences
from fusion_model.errors import FusionLMError
from fusion_model.experiments.corpora import NATURAL_STORIES

ALIGNMENTS = ("stored", "corrected")


@dataclass(frozen=True)
class ReadingTimes:
    """Words in reading order, story after story.

    Attributes:
        name: of the corpus.
        words: [N].
        stories: which story each is of, int [N], ascending.
        times: mean reading time of each word in ms, [N]; NaN: none.
        shifted: the times were stored one position early (Natural Stories before 2025).
    """

    name: str
    words: list[str]
    stories: np.ndarray
    times: np.ndarray
    shifted: bool

    def aligned(self, alignment: str) -> np.ndarray:
        """Times by word, [N]: `stored`, or `corrected`: the one stored a position earlier."""
        if alignment == "stored":
            return self.times
        moved = np.concatenate([[math.nan], self.times[:-1]])
        first = np.concatenate([[True], self.stories[1:] != self.stories[:-1]])
        return np.where(first, math.nan, moved)

    @property
    def alignments(self) -> tuple[str, ...]:
        return ALIGNMENTS if self.shifted else ALIGNMENTS[:1]

    def documents(self) -> list[Document]:
        """The stories, split into sentences; their words, one after the other, are `words`."""
        documents = []
        for story in np.unique(self.stories):
            words = [self.words[i] for i in np.flatnonzero(self.stories == story)]
            sentences = split_sentences(" ".join(words))
            if [w for s in sentences for w in s.split()] != words:
                raise FusionLMError(f"story {story} of {self.name}: a word has a space in it")
            documents.append(Document(str(story), sentences))
        return documents


def read_natural_stories(folder: Path) -> ReadingTimes:
    """`all_stories.tok` and `processed_wordinfo.tsv`, as released before the correction.

    Raises:
        FusionLMError: a file is missing or lacks a column.
    """
    words = _rows(folder / NATURAL_STORIES[0], ("word", "zone", "item"))
    info = _rows(folder / NATURAL_STORIES[1], ("zone", "item", "meanItemRT"))
    try:
        times = {(int(r["item"]), int(r["zone"])): float(r["meanItemRT"]) for r in info}
        places = [(int(r["item"]), int(r["zone"])) for r in words]
    except ValueError as error:
        raise FusionLMError(f"{folder}: {error}") from None
    order = sorted(range(len(places)), key=places.__getitem__)
    return ReadingTimes(
        "Natural Stories",
        [words[i]["word"] for i in order],
        np.array([places[i][0] for i in order]),
        np.array([times.get(places[i], math.nan) for i in order]),
        shifted=True,
    )


def read_tsv(path: Path) -> ReadingTimes:
    """Columns `story`, `word`, `time` (ms; empty: none), one word a row in reading order.

    Raises:
        FusionLMError: a column is missing, or a time is no number, with its line.
    """
    rows = _rows(path, ("story", "word", "time"))
    names = list(dict.fromkeys(r["story"] for r in rows))
    stories = np.array([names.index(r["story"]) + 1 for r in rows])
    if (np.diff(stories) < 0).any():
        raise FusionLMError(f"{path}: the rows of a story are not together")
    times = []
    for line, row in enumerate(rows, start=2):
        try:
            times.append(float(row["time"]) if row["time"] else math.nan)
        except ValueError:
            raise FusionLMError(f"{path}, line {line}: {row['time']!r} is no time in ms") from None
    return ReadingTimes(path.stem, [r["word"] for r in rows], stories, np.array(times), False)


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            missing = [c for c in columns if c not in (reader.fieldnames or ())]
            rows = list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise FusionLMError(f"cannot read {path}: {error}") from None
    if missing:
        raise FusionLMError(f"{path} lacks the column {', '.join(missing)}: a TSV with a header")
    for line, row in enumerate(rows, start=2):
        if any(row[c] is None for c in columns):
            raise FusionLMError(f"{path}, line {line}: too few columns")
    if not rows:
        raise FusionLMError(f"{path} has no rows")
    return rows


def plain(word: str) -> str:
    """Lower case, without punctuation around it: what length and frequency are of."""
    return word.lower().strip(string.punctuation + "“”‘’—–…")


class Frequencies:
    """log relative frequency of words in a text, add-one smoothed.

    The text should be what the models were trained on, so that ΔLL is what they know beyond
    their own word counts; a large corpus' list (`wordfreq`) would ask another question.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        words = (plain(w) for d in documents for s in d.sentences for w in s.split())
        self._counts = Counter(words)
        self.tokens = sum(self._counts.values())

    def log(self, word: str) -> float:
        """Natural logarithm; all words never seen share one place in the vocabulary."""
        total = self.tokens + len(self._counts) + 1
        return math.log((self._counts[plain(word)] + 1) / total)
