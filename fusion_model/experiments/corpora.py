"""Corpora into training, dev and test text, the same for all arms.

Of each document, dev comes first, then test, then training text: contiguous, so that "the
sentence before" is meant, and a smaller training text is part of every larger one.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion_model.data.text import Document, read_documents
from fusion_model.errors import FusionLMError
from fusion_model.files import write_text

NATURAL_STORIES = ("all_stories.tok", "processed_wordinfo.tsv")


@dataclass(frozen=True)
class Texts:
    """Folders of text, one sentence a line.

    Attributes:
        name: of the corpus trained on.
        tests: test texts by name; `test` is of the training corpus.
    """

    name: str
    train: Path
    dev: Path
    tests: dict[str, Path]


def find_corpora(sources: Sequence[str]) -> dict[str, list[Document]]:
    """Documents by corpus.

    Args:
        sources: `hf:NAME`, text files, folders of .txt files, or folders of such folders, of
            which each is a corpus. One called `brown…` has a sentence a line, as that corpus does.

    Raises:
        FusionLMError: nothing to read.
    """
    corpora: dict[str, list[Document]] = {}
    for source in sources:
        if source.startswith("hf:"):
            found = {source: source}
        elif not Path(source).exists():
            raise FusionLMError(f"there is no {source}: give --data a folder of text, or hf:NAME")
        else:
            inside = [p for p in sorted(Path(source).glob("*/")) if any(p.rglob("*.txt"))]
            several = inside and not any(Path(source).glob("*.txt"))
            found = {p.name: str(p) for p in (inside if several else [Path(source)])}
        for name, path in found.items():
            split = "lines" if name.startswith("brown") else "sentences"
            corpora[name] = read_documents([path], split, clean_wikitext=True)
    return corpora


def find_reading_times(sources: Sequence[str]) -> Path | None:
    """The folder of Natural Stories among the data, if it is there."""
    for source in sources:
        for folder in (Path(source), Path(source) / "natural-stories"):
            if all((folder / name).is_file() for name in NATURAL_STORIES):
                return folder
    return None


def choose_corpus(corpora: Mapping[str, Sequence[Document]], name: str | None) -> str:
    """The corpus to train on: the one named, or the one with most sentences."""
    if not corpora:
        raise FusionLMError(
            "this experiment trains models: give it text with --data, a folder (one of folders "
            "of .txt files, too) or hf:NAME"
        )
    if name is not None and name not in corpora:
        raise FusionLMError(f"no corpus {name!r} in --data: there is {', '.join(corpora)}")
    return name or max(corpora, key=lambda c: sum(len(d.sentences) for d in corpora[c]))


def write_texts(
    name: str, documents: Sequence[Document], sizes: tuple[int, int, int], out: Path
) -> Texts:
    """Take dev, test and training sentences of all documents, in proportion to their length.

    Args:
        sizes: sentences to train on, for dev, for test.
        out: folder under which the texts go; its name holds a hash of them.

    Raises:
        FusionLMError: too little text.
    """
    train, dev, test = sizes
    available = sum(len(d.sentences) for d in documents)
    if available < sum(sizes):
        raise FusionLMError(
            f"the corpus {name} has {available:,} sentences, {sum(sizes):,} are needed (training, "
            "dev and test): give more text, or choose --corpus"
        )
    starts = [0] * len(documents)
    folders = {
        part: _write(f"{plain_name(name)}-{part}-{size}", _take(documents, size, starts), out)
        for part, size in (("dev", dev), ("test", test), ("train", train))
    }
    return Texts(name, folders["train"], folders["dev"], {"test": folders["test"]})


def write_test(name: str, documents: Sequence[Document], size: int, out: Path) -> Path:
    """A test text of another domain, up to `size` sentences."""
    size = min(size, sum(len(d.sentences) for d in documents))
    return _write(f"{plain_name(name)}-domain", _take(documents, size, [0] * len(documents)), out)


def _take(documents: Sequence[Document], size: int, starts: list[int]) -> dict[str, list[str]]:
    """The next sentences of each document by file name, `size` in proportion to the documents'
    lengths; `starts`, the sentences that were taken before, move on."""
    passed = np.cumsum([0, *(len(d.sentences) for d in documents)])
    taken = {}
    for i, share in enumerate(np.diff(size * passed // passed[-1]).tolist()):
        if share:
            name = f"{i:03d}-{Path(documents[i].name).stem}"
            taken[name] = documents[i].sentences[starts[i] : starts[i] + share]
        starts[i] += share
    return taken


def plain_name(name: str) -> str:
    """Fit for a file's name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)


def _write(name: str, files: Mapping[str, Sequence[str]], out: Path) -> Path:
    contents = {stem: "\n".join(lines) + "\n" for stem, lines in files.items()}
    digest = hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest()[:8]
    folder = out / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    for stem, text in contents.items():
        write_text(folder / f"{stem}.txt", text)
    return folder
