"""Before training: whose the folder is, by options and texts; whether memory holds the model."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, TypedDict

import torch

from fusion_model.errors import CheckpointError, FusionLMError
from fusion_model.hashes import check_files
from fusion_model.kernels import resolve_backend
from fusion_model.schema import read_json, write_json
from fusion_model.training.options import TrainingOptions

CLAIM = "training.json"
FINISHED = "finished"
TOKENIZER = "tokenizer_config.json"  # of the tokenizer's files the one that is there last


class Claim(TypedDict):
    """What every `training.json` says; the other options and the texts' hashes are compared."""

    train_file: list[str]
    dev_file: list[str]


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
        if _is_trained(out):
            raise CheckpointError(
                f"{out} holds a run with other settings ({', '.join(changed)}): choose another "
                "--out, or repeat the command that began it"
            )
        if main:  # begun and never trained, such as with a mistyped file name
            (out / TOKENIZER).unlink(missing_ok=True)
    elif out.exists() and any(not p.name.startswith((".lock", ".saving-")) for p in out.iterdir()):
        raise CheckpointError(f"{out} holds other files: choose an empty or new folder for --out")
    if main:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)


def _is_trained(out: Path) -> bool:
    return (out / "model.safetensors").exists() or any(out.glob("checkpoint-*"))


def _read_claim(out: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(out / CLAIM, Claim)
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
    if changed and _is_trained(out):
        raise CheckpointError(
            f"{out} was trained on other text ({', '.join(changed)} changed since): choose another "
            "--out, or bring the text back"
        )
    if main and any(name not in found or name in changed for name in texts):
        if changed:
            (out / TOKENIZER).unlink(missing_ok=True)
        write_json(out / CLAIM, found | texts)


def claim_finished(out: Path) -> None:
    """Say in `training.json` that the run is over: its checkpoint may go.

    Raises:
        CheckpointError: the model is missing or damaged.
    """
    try:
        check_files(out)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {out} to train anew") from None
    found = _read_claim(out)
    if not found.get(FINISHED):
        write_json(out / CLAIM, found | {FINISHED: True})


def is_finished(out: Path) -> bool:
    return (out / CLAIM).exists() and bool(_read_claim(out).get(FINISHED))


def check_machine(options: TrainingOptions, device: torch.device) -> None:
    """Refuse what cannot be trained here, before texts are read and encoded.

    Raises:
        FusionLMError: the backend cannot run; weights, gradients and Adam's two moments exceed the
            memory.
    """
    try:
        resolve_backend(options.backend, device)
    except ValueError as error:
        raise FusionLMError(str(error)) from None
    width, hidden = options.embedding_size, options.hidden_size
    matrices = options.vocab_size * width * (1 if options.tie_weights else 2) + hidden * width
    matrices += sum(
        4 * hidden * (hidden + (hidden if i else width)) for i in range(options.num_layers)
    )
    needed = 4 * 4 * matrices
    if device.type == "cuda":
        there = torch.cuda.mem_get_info(device)[1]
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > there:
        raise FusionLMError(
            f"training a model of this size takes {needed / 2**30:,.0f} GiB, {device.type} has "
            f"{there / 2**30:,.0f}: choose a smaller hidden size, embedding size or vocabulary"
        )
