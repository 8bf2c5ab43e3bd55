"""Stage 1: text files into documents of sentences, whitespace normalised."""

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencex

from fusion_model.errors import TextError, first_line

SPLITS = ("sentences", "lines")


@dataclass(frozen=True)
class Document:
    """One file: its name and its sentences, each with single spaces between words.

    `text` is what they were found in (default: the sentences, joined by spaces).
    """

    name: str
    sentences: list[str]
    text: str = ""

    def __post_init__(self) -> None:
        if not self.text:
            object.__setattr__(self, "text", " ".join(self.sentences))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; of standard input for `-`.

    Raises:
        TextError: missing, empty, binary or in another encoding.
    """
    if str(path) == "-" and sys.stdin is None:
        raise TextError("standard input is closed")
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}") from error
    if b"\0" in data:
        raise TextError(f"{path} is a binary file (it has a NUL byte): give plain UTF-8 text")
    try:
        text = data.decode("utf-8-sig")
        if not text.strip():
            raise TextError(f"{path} is empty: give a file with some text in it")
        return text
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}): convert it, "
            f"for example with: iconv -f latin1 -t utf-8 {path} > {path.stem}-utf8.txt"
        ) from None


def split_sentences(text: str, split: str = "sentences") -> list[str]:
    """Sentences of a text, by `sentencex` within each paragraph, or one a line."""
    if split not in SPLITS:
        raise TextError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if split == "lines":
        pieces: Iterable[str] = re.split(r"\r\n|\r|\n", text)  # splitlines knows more line ends
    else:
        paragraphs = (" ".join(p.split()) for p in re.split(r"\n\s*\n", text))
        pieces = (s for p in paragraphs if p for s in sentencex.segment("en", p))
    return [" ".join(piece.split()) for piece in pieces if piece.strip()]


def detokenize(text: str) -> str:
    """Undo the spacing of WikiText: ` @-@ ` inside words, spaces around punctuation."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?%)\]}]|'s\b|n't\b|'(?:re|ve|ll|d|m)\b)", r"\1", text)
    text = re.sub(r"([(\[{$£]) ", r"\1", text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    return re.sub(r"^ (= )+(.*?)( =)+ *$", r"\2.", text, flags=re.MULTILINE)


def read_documents(
    sources: Sequence[str], split: str = "sentences", clean_wikitext: bool = False
) -> list[Document]:
    """Documents from files (`-`: standard input), directories of `.txt` files, or
    `hf:NAME[/CONFIG][:SPLIT]`.

    Raises:
        TextError: as `read_text`; a directory without text; a dataset that cannot be loaded.
    """
    documents = []
    for source in sources:
        for name, text in _read_source(source):
            read = detokenize(text) if clean_wikitext else text
            documents.append(Document(name, split_sentences(read, split), read))
    return documents


def _read_source(source: str) -> list[tuple[str, str]]:
    if source.startswith("hf:"):
        return [(source, _read_dataset(source[3:]))]
    if not source:
        raise TextError("the name of a text is empty: give a file, a folder or hf:NAME")
    path = Path(source)
    if not path.is_dir():
        return [(str(path), read_text(path))]
    files = sorted(path.rglob("*.txt"))
    if not files:
        raise TextError(f"{path} holds no .txt file: give a folder of text files, or one file")
    return [(str(file), read_text(file)) for file in files]


def _read_dataset(spec: str) -> str:
    from datasets import load_dataset

    name, _, split = spec.partition(":")
    owner_name, config = name, None
    if not Path(name).exists() and name.count("/") == 2:
        owner_name, config = name.rsplit("/", 1)
    try:
        data = load_dataset(owner_name, config, split=split or "train")
    except Exception as error:  # the library raises a dozen kinds
        raise TextError(f"cannot load the dataset {name!r}: {first_line(error)}") from error
    if "text" not in data.column_names:
        raise TextError(f"the dataset {name!r} has no column 'text', only {data.column_names}")
    texts = [text for text in data["text"] if text is not None]
    if not all(isinstance(text, str) for text in texts):
        raise TextError(f"the column 'text' of the dataset {name!r} holds more than text")
    text = "\n\n".join(texts)
    if not text.strip():
        raise TextError(f"the dataset {name!r} ({split or 'train'}) is empty")
    return text
