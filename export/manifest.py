"""What an export consists of: `manifest.json`, with the hash of every file beside it.

Nothing here needs PyTorch.
"""

from pathlib import Path
from typing import Any

from fusion_model.errors import ExportError
from fusion_model.files import sha256
from fusion_model.schema import read_json, write_json

MANIFEST = "manifest.json"
FORMAT = 1
SEQUENCE, STEP, ENCODER = "model.onnx", "step.onnx", "encoder.onnx"
WEIGHTS = "weights.bin"  # of both graphs
ENCODER_WEIGHTS = "encoder_weights.bin"
TOKENIZER, ENCODER_TOKENIZER = "tokenizer.json", "encoder_tokenizer.json"
PRECISIONS = ("fp32", "fp16", "int8")
# Below 20 there is no Gelu operator; from 22 on, CUDA kernels may not be matched to LSTM.
OPSETS = (20, 21)
OLDEST_RUNTIME = "1.22"


def write_manifest(folder: Path, contents: dict[str, Any]) -> None:
    """Write `contents` and the hash of every file that lies in the folder."""
    files = {
        path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"format": FORMAT, **contents, "files": files})


def strangers(folder: Path) -> list[str]:
    """Files that are not of an export in that folder; the folder itself, if it is a file."""
    if not folder.is_dir():
        return [folder.name] if folder.exists() else []
    try:
        found = read_json(folder / MANIFEST, dict)
        own = {MANIFEST, *found["files"]} if "opset" in found else set()
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    return sorted(p.name for p in folder.iterdir() if p.name not in own)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export, after every file was held against it.

    Raises:
        ExportError: no export, one of another format or opset, or a file that is missing or is
            not the one that was exported; the message names it.
    """
    path = folder / MANIFEST
    again = "export the model again with fusion-lm export"
    if not path.exists():
        raise ExportError(
            f"{folder} holds no {MANIFEST}: name a folder that fusion-lm export wrote"
        )
    try:
        manifest: dict[str, Any] = read_json(path, dict)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read ({error}): {again}") from error
    if (found := manifest.get("format")) != FORMAT:
        raise ExportError(f"{path} has format {found}, this version reads {FORMAT}: {again}")
    if manifest["opset"] not in OPSETS:
        raise ExportError(
            f"{folder} was exported for ONNX opset {manifest['opset']}: this version runs "
            f"{' and '.join(map(str, OPSETS))}; {again}"
        )
    for name, recorded in manifest["files"].items():
        if Path(name).name != name:
            raise ExportError(f"{path} names {name!r}, which does not lie beside it: {again}")
        if not (folder / name).is_file():
            raise ExportError(f"{folder / name} is missing: {again}")
        if sha256(folder / name) != recorded["sha256"]:
            raise ExportError(
                f"{folder / name} is not the file that was exported (its sha256 differs from "
                f"{MANIFEST}'s): {again}"
            )
    return manifest
