"""Whose a training folder is: the options of its run, and hashes of its texts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from fusion_model.errors import CheckpointError
from fusion_model.schema import read_json, write_json
from fusion_model.training.options import TrainingOptions

CLAIM = "training.json"
TOKENIZER = "tokenizer_config.json"  # of the tokenizer's files the one that is there last


def claim_folder(options: TrainingOptions, out: Path, main: bool) -> None:
    """A folder belongs to one run: its options are kept in `training.json`."""
    path = out / CLAIM
    wanted = json.loads(json.dumps(dataclasses.asdict(options)))
    defaults = {f.name: f.default for f in dataclasses.fields(options)}  # newer than the run
    if path.exists():
        found = defaults | _read_claim(out)
        changed = sorted(k for k in wanted if found.get(k) != wanted[k])
        if not changed:
            return
        if any(out.glob("checkpoint-*")):
            raise CheckpointError(
                f"{out} holds a run with other settings ({', '.join(changed)}): choose another "
                "--out, or repeat the command that began it"
            )
        if main:  # begun and never trained, such as with a mistyped file name
            (out / TOKENIZER).unlink(missing_ok=True)
    elif out.exists() and any(not p.name.startswith((".lock", "saving-")) for p in out.iterdir()):
        raise CheckpointError(f"{out} holds other files: choose an empty or new folder for --out")
    if main:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)


def _read_claim(out: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(out / CLAIM, dict[str, Any])
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{out / CLAIM} is damaged ({error}): choose another --out") from None
    return found


def claim_texts(out: Path, texts: dict[str, str], main: bool) -> None:
    """A run is of these texts: their hashes are kept in `training.json`, too.

    Raises:
        CheckpointError: it was begun with others.
    """
    found = _read_claim(out)
    changed = [name for name, digest in texts.items() if found.get(name, digest) != digest]
    if changed and any(out.glob("checkpoint-*")):
        raise CheckpointError(
            f"{out} was trained on other text ({', '.join(changed)} changed since): choose another "
            "--out, or bring the text back"
        )
    if main and any(name not in found or name in changed for name in texts):
        if changed:
            (out / TOKENIZER).unlink(missing_ok=True)
        write_json(out / CLAIM, found | texts)
