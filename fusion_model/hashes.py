"""Hashes of a model's files: which was damaged since they were written."""

from pathlib import Path

from fusion_model.encoders.controls import BAGS
from fusion_model.errors import CheckpointError
from fusion_model.files import sha256
from fusion_model.schema import read_json, write_json

HASHES = "sha256.json"
MODEL_FILES = (
    *("config.json", "model.safetensors", "tokenizer.json"),
    *("tokenizer_config.json", "generation_config.json", *(f"{bag}.json" for bag in BAGS)),
)


def write_hashes(folder: Path) -> None:
    """Keep hashes of a model's files, which loading holds them to."""
    found = {name: sha256(folder / name) for name in MODEL_FILES if (folder / name).exists()}
    write_json(folder / HASHES, found)


def check_files(folder: Path) -> None:
    """Of a model's folder: readable, and unchanged since it was written.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        for name in MODEL_FILES[:3]:
            (folder / name).open("rb").close()
        if not (folder / HASHES).exists():
            return  # saved by other means
        for name, expected in read_json(folder / HASHES, dict[str, str]).items():
            if Path(name).name == name and sha256(folder / name) != expected:
                raise CheckpointError(
                    f"{folder / name} is damaged: its sha256 differs from that in {HASHES} (if you "
                    f"changed it yourself, delete {HASHES})"
                )
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder / HASHES} is damaged ({error}): delete it") from error
