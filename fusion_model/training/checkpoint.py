"""Checkpoints of a training run: safetensors and JSON only, complete or absent.

A killed run leaves whole `checkpoint-<step>` folders behind; the older ones go once the newer is
there.
"""

import math
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fusion_model.errors import CheckpointError
from fusion_model.files import replacing, sha256, why_not_written
from fusion_model.schema import Count, check, read_json, write_json

FILES = ("model.safetensors", "optimizer.safetensors")


@dataclass
class TrainState:
    """Where a run is; saved with each checkpoint."""

    step: Count = 0
    epoch: Count = 0
    batch: Count = 0
    loss_sum: float = 0.0
    tokens: Count = 0
    seconds: float = 0.0
    best_dev: float = math.inf
    bad_epochs: Count = 0
    finished: bool = False


def save_checkpoint(
    out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState
) -> None:
    """Write `out/checkpoint-<state.step>` and remove the ones before it.

    Raises:
        CheckpointError: the disk is full or not writable; the earlier checkpoint stays.
    """
    final = out / f"checkpoint-{state.step:08d}"
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
            write_json(folder / "state.json", {**asdict(state), "sha256": hashes})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot write {final}: {why_not_written(error)}; the checkpoint before it is kept: "
            "make room, then run the same command to go on"
        ) from error
    for old in out.glob("checkpoint-*"):
        if old != final:
            shutil.rmtree(old)


def load_checkpoint(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Load the newest checkpoint into model and optimizer; its state, a new one without.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the model.
    """
    found = sorted(out.glob("checkpoint-*"))
    if not found:
        return TrainState()
    path = found[-1]
    try:
        saved_state = read_json(path / "state.json", TrainState)
        state = TrainState(**{f.name: saved_state[f.name] for f in fields(TrainState)})
        check(hashes := saved_state.get("sha256"), dict[str, str], "sha256")
        for name in FILES:
            if sha256(path / name) != hashes[name]:
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
