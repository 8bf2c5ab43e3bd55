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
    if size.mixed:
        train, dev, tests = _mixed(corpora)
    else:
        dev, rest = _split(corpora[name], size.dev)
        test, train = _split(rest, size.test)
        tests = {"test": test} | {n: list(docs) for n, docs in corpora.items() if n != name}
    if (left := sum(len(d.sentences) for d in train)) < most:
        raise FusionLMError(
            f"of the corpus {name} {left:,} sentences are left for training, {most:,} are needed "
            f"(beside {size.dev:,} for dev, {size.test:,} for test): give more, or choose --corpus"
        )
    plain = plain_name(name)
    return Texts(
        name,
        _write(f"{plain}-train-{sentences}", _split(train, sentences)[0], out),
        _write(f"{plain}-train-{most}", _split(train, most)[0], out),
        _write(f"{plain}-dev-{size.dev}", _split(dev, size.dev)[0], out),
        {
            test: _write(f"{plain_name(test)}-test", _clusters(_split(docs, size.test)[0]), out)
            for test, docs in tests.items()
        },
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


def _clusters(documents: list[Document]) -> list[Document]:
    """What statistics take as independent: documents, or of few runs of their sentences."""
    if len(documents) >= FEW:
        return documents
    return [
        Document(d.name, d.sentences[start : start + RUN])
        for d in documents
        for start in range(0, len(d.sentences), RUN)
    ]


def _split(documents: Sequence[Document], size: int) -> tuple[list[Document], list[Document]]:
    """The first sentences of each document, `size` of them or all, in proportion to the
    documents' lengths; and what is left of the documents."""
    passed = np.cumsum([0, *(len(d.sentences) for d in documents)])
    shares = np.diff(min(size, passed[-1]) * passed // max(passed[-1], 1)).tolist()
    pairs = list(zip(documents, shares, strict=True))
    taken = [Document(d.name, d.sentences[:share]) for d, share in pairs if share]
    return taken, [Document(d.name, d.sentences[share:]) for d, share in pairs]


def plain_name(name: str) -> str:
    """Fit for a file's name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)


def _write(name: str, documents: Sequence[Document], out: Path) -> Path:
    contents = {
        f"{i:03d}-{Path(d.name).stem}": "\n".join(d.sentences) + "\n"
        for i, d in enumerate(documents)
    }
    digest = hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest()[:8]
    folder = out / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    for stem, text in contents.items():
        write_text(folder / f"{stem}.txt", text)
    return folder
