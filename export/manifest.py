"""What an export consists of: `manifest.json`, with the hash of every file beside it.

Nothing here needs PyTorch.
"""

from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from fusion_model.errors import ExportError
from fusion_model.files import sha256
from fusion_model.schema import Count, Size, check, read_json, write_json

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


class Versioned(TypedDict):
    """What every format says."""

    format: int


class TokenizerFacts(TypedDict):
    """See `fusion_model.export.runtime.tokenizer.describe_tokenizer`."""

    special_ids: list[Count]
    pad_token_id: Count | None
    bos_token_id: Count | None
    eos_token_id: Count | None
    unk_token_id: Count | None
    mask_token_id: Count | None


class EncoderFacts(TypedDict):
    """The encoder of an export."""

    kind: Literal["zeros", "bag", "onnx", "trees"]
    dim: Size
    policy: NotRequired[str]


class PretrainedFacts(EncoderFacts):
    """One that is neither `zeros` nor a bag of words."""

    name: str
    pooling: str
    window: Size
    content_sha256: str
    depth: NotRequired[Size]
    vocabulary: NotRequired[Size]
    words: NotRequired[Count | None]  # where their table begins
    precision: NotRequired[str]
    tokenizer: TokenizerFacts


class ModelFacts(TypedDict):
    """What the runtime reads of the configuration."""

    fusion: str
    vocab_size: Size
    embedding_size: Size
    hidden_size: Size
    num_layers: Size
    prefix_size: Size
    encoder: str | None
    pooling: str
    view: str
    policy: str
    shuffle: str
    shares_vocabulary: bool


class File(TypedDict):
    """A file beside the manifest."""

    sha256: str


class Manifest(Versioned):
    """What `manifest.json` says, besides what is for people."""

    opset: int
    precision: str
    oldest_onnxruntime: str
    model: ModelFacts
    tokenizer: TokenizerFacts
    encoder: EncoderFacts | None
    verified: dict[str, Any]
    files: dict[str, File]


def write_manifest(folder: Path, contents: dict[str, Any]) -> None:
    """Write `contents` and the hash of every file that lies in the folder."""
    files = {
        path.name: {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"format": FORMAT, **contents, "files": files})


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
        found = read_json(path, Versioned)["format"]
        if found != FORMAT:
            raise ExportError(f"{path} has format {found}, this version reads {FORMAT}: {again}")
        manifest: dict[str, Any] = read_json(path, Manifest)
        if manifest["encoder"] and manifest["encoder"]["kind"] in ("onnx", "trees"):
            check(manifest["encoder"], PretrainedFacts, "encoder")
    except ExportError:
        raise
    except (OSError, ValueError) as error:
        raise ExportError(f"{path} cannot be read ({error}): {again}") from error
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
