"""Checkpoints of a training run: safetensors and JSON only, complete or absent.

`checkpoint-<step>` is written beside its final name and renamed, so that a killed run leaves
whole checkpoints behind; the older ones go once the newer is there.
"""

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fusion_model.errors import CheckpointError

FILES = ("model.safetensors", "optimizer.safetensors")


def save_checkpoint(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write `out/checkpoint-<state["step"]>` and remove the ones before it.

    Raises:
        CheckpointError: the disk is full or not writable; the earlier checkpoint stays.
    """
    final = out / f"checkpoint-{state['step']:08d}"
    temporary = out / "checkpoint.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(dict(model.named_parameters()), temporary / FILES[0])
        save_file(_optimizer_tensors(model, optimizer), temporary / FILES[1])
        hashes = {name: _sha256(temporary / name) for name in FILES}
        (temporary / "state.json").write_text(json.dumps({**state, "sha256": hashes}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space" in str(error)
        why = "the disk is full" if full else str(error)
        raise CheckpointError(
            f"cannot write {final}: {why}; the checkpoint before it is kept: make room, then run "
            "the same command to go on"
        ) from error
    for old in out.glob("checkpoint-*"):
        if old != final:
            shutil.rmtree(old)


def load_checkpoint(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any] | None:
    """Load the newest checkpoint into model and optimizer; its state, or None without one.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the model.
    """
    found = sorted(out.glob("checkpoint-*"))
    if not found:
        return None
    path = found[-1]
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        for name in FILES:
            if _sha256(path / name) != state["sha256"][name]:
                raise CheckpointError(f"{path / name} is damaged: its checksum differs")
        saved = load_file(path / FILES[0])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(saved[name])
        _restore_optimizer(model, optimizer, load_file(path / FILES[1]))
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {path} to start over") from None
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be used ({error}); delete it to start over"
        ) from error
    return state


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    for key, value in saved.items():
        name, _, entry = key.rpartition("/")
        optimizer.state[parameters[name]][entry] = value.to(parameters[name].device)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
