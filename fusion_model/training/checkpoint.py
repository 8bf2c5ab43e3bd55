"""Checkpoints of a training run: safetensors and JSON only, complete or absent.

A killed run leaves whole `checkpoint-<step>` folders behind; the older ones go once the newer is
there.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fusion_model.errors import CheckpointError
from fusion_model.files import replacing, sha256, why_not_written

FILES = ("model.safetensors", "optimizer.safetensors")


def save_checkpoint(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write `out/checkpoint-<state["step"]>` and remove the ones before it.

    Raises:
        CheckpointError: the disk is full or not writable; the earlier checkpoint stays.
    """
    final = out / f"checkpoint-{state['step']:08d}"
    moments = {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    try:
        with replacing(final) as folder:
            folder.mkdir(parents=True)
            save_file(dict(model.named_parameters()), folder / FILES[0])
            save_file(moments, folder / FILES[1])
            hashes = {name: sha256(folder / name) for name in FILES}
            (folder / "state.json").write_text(json.dumps({**state, "sha256": hashes}, indent=1))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {final}: {why_not_written(error)}; the checkpoint before it is kept: "
            "make room, then run the same command to go on"
        ) from error
    for old in out.glob("checkpoint-*"):
        if old != final:
            shutil.rmtree(old)


def load_checkpoint(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load the newest checkpoint into model and optimizer; its state, empty without one.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the model.
    """
    found = sorted(out.glob("checkpoint-*"))
    if not found:
        return {}
    path = found[-1]
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        for name, expected in state.pop("sha256").items():
            if sha256(path / name) != expected:
                raise CheckpointError(f"{path / name} is damaged: its checksum differs")
        saved = load_file(path / FILES[0])
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
        for key, value in load_file(path / FILES[1]).items():
            name, _, entry = key.rpartition("/")
            optimizer.state[parameters[name]][entry] = value.to(parameters[name].device)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; delete {path} to start over") from None
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint {path} cannot be used ({error}); delete it to start over"
        ) from error
    return state
