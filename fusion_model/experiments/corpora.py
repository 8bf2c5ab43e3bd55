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
from fusion_model.experiments.sizes import Size
from fusion_model.files import write_text

NATURAL_STORIES = ("all_stories.tok", "processed_wordinfo.tsv")
FEW, RUN = 10, 100  # with fewer documents, statistics take runs of so many sentences


@dataclass(frozen=True)
class Texts:
    """Folders of text, one sentence a line.

    Attributes:
        name: of the corpus trained on.
        vocabulary: the largest training text, which the tokens of all sizes are from.
        tests: test texts by name, a file what statistics take as independent; `test` is of the
            training corpus.
    """

    name: str
    train: Path
    vocabulary: Path
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
    corpora: Mapping[str, Sequence[Document]], name: str, size: Size, sentences: int, out: Path
) -> Texts:
    """Training, dev and test text as folders.

    Of one corpus, dev, test and training sentences are taken of all documents, in proportion to
    their length; the other corpora are tests of other domains. Size `medium` mixes Brown and
    books, see `_mixed`. What is trained on is a part of every larger training text.

    Args:
        name: of the corpus, or what the mixture is called.
        sentences: to train on.
        out: folder under which the texts go; the name of each holds a hash of it.

    Raises:
        FusionLMError: too little text.
    """
    most = max(size.sentences, *size.data_sizes)
    needed = most + (0 if size.mixed else size.dev + size.test)
    train, dev, tests = _mixed(corpora) if size.mixed else (list(corpora[name]), [], {})
    available = sum(len(d.sentences) for d in train)
    if available < needed:
        raise FusionLMError(
            f"the corpus {name} has {available:,} sentences, {needed:,} are needed (training, "
            "dev and test): give more text, or choose --corpus"
        )
    if size.mixed:
        chosen, _ = _split(dev, size.dev)
        files = {}
    else:
        chosen, train = _split(train, size.dev)
        own, train = _split(train, size.test)
        files = {"test": own}
        tests = {other: list(docs) for other, docs in corpora.items() if other != name}
    files |= {test: _split(docs, size.test)[0] for test, docs in tests.items()}
    plain = plain_name(name)
    return Texts(
        name,
        _write(f"{plain}-train-{sentences}", _split(train, sentences)[0], out),
        _write(f"{plain}-train-{most}", _split(train, most)[0], out),
        _write(f"{plain}-dev-{size.dev}", chosen, out),
        {t: _write(f"{plain_name(t)}-test", _clusters(own), out) for t, own in files.items()},
    )


MIXTURE = "Brown and books"


def _mixed(
    corpora: Mapping[str, Sequence[Document]],
) -> tuple[list[Document], list[Document], dict[str, list[Document]]]:
    """Documents for training, dev, and tests: the first 80 % of each file of Brown, 82 to 90 %,
    and the rest; nine books, *Bryant*, and *Thursday*; speeches and WikiText-2 are tests whole."""
    missing = [n for n in ("brown", "prose", "speeches", "wikitext-2") if n not in corpora]
    if missing:
        raise FusionLMError(
            f"size medium is of ../shared/data as it is: --data lacks {', '.join(missing)}"
        )

    def part(low: float, high: float) -> list[Document]:
        return [
            Document(d.name, d.sentences[int(low * n) : int(high * n)])
            for d in corpora["brown"]
            for n in [len(d.sentences)]
        ]

    books: dict[str, list[Document]] = {"bryant": [], "thursday": [], "": []}
    for book in corpora["prose"]:
        books[next(key for key in books if key in book.name)].append(book)
    tests = {"test": part(0.9, 1), "thursday": books["thursday"]}
    tests |= {name: list(corpora[name]) for name in ("speeches", "wikitext-2")}
    return part(0, 0.8) + books[""], part(0.82, 0.9) + books["bryant"], tests


def _clusters(files: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Documents as they are if there are several, else runs of their sentences: what statistics
    take as independent."""
    if len(files) >= FEW:
        return dict(files)
    return {
        f"{stem}-{start:05d}": lines[start : start + RUN]
        for stem, lines in files.items()
        for start in range(0, len(lines), RUN)
    }


def _split(documents: Sequence[Document], size: int) -> tuple[dict[str, list[str]], list[Document]]:
    """The first sentences of each document by file name, `size` of them or all, in proportion to
    the documents' lengths; and the documents without them."""
    passed = np.cumsum([0, *(len(d.sentences) for d in documents)])
    shares = np.diff(min(size, passed[-1]) * passed // max(passed[-1], 1)).tolist()
    taken = {
        f"{i:03d}-{Path(d.name).stem}": d.sentences[:share]
        for i, (d, share) in enumerate(zip(documents, shares, strict=True))
        if share
    }
    rest = [Document(d.name, d.sentences[n:]) for d, n in zip(documents, shares, strict=True)]
    return taken, rest


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
