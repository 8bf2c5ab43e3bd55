"""Saved models, by folder, hub name, or the name of one that ships."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from fusion_model.attached import load_planner
from fusion_model.config import FusionLMConfig
from fusion_model.devices import resolve_device, resolve_dtype
from fusion_model.errors import CheckpointError, FusionLMError, first_line
from fusion_model.hashes import check_files
from fusion_model.language_model import FusionLM
from fusion_model.model import FusionLMForCausalLM

SHIPPED = Path(__file__).parent / "checkpoints"


def load(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    encoder: str | None = None,
    encoder_dtype: str = "float32",
    backend: str = "auto",
    policy: str | None = None,
    model_class: type[FusionLMForCausalLM] = FusionLMForCausalLM,
) -> FusionLM:
    """A saved model with tokenizer and encoder: safetensors only, no remote code.

    Args:
        name: folder, hub name, or a model that ships: `fusion-lm-small` and its unfused twin
            `fusion-lm-small-unfused`.
        device: where the model and the encoder run.
        dtype: `float32`, `bfloat16`, `float16` or `auto`, of the language model.
        encoder: where the encoder lies now, if it moved since training.
        encoder_dtype: as `dtype`, of the encoder.
        backend: one of `fusion_model.kernels.BACKENDS`.
        policy: in place of the model's own, to measure what it costs: the scores are then of
            embeddings that the model was not trained with.
        model_class: the subclass that was trained.

    Raises:
        CheckpointError: missing, damaged, pickled, or no fusion language model.
        EncoderError: the encoder is missing, or is not the one of the training.
    """
    model, tokenizer = load_model(name, model_class)
    device = resolve_device(str(device))
    model.to(device=device, dtype=resolve_dtype(dtype, device))  # type: ignore[call-arg]
    try:
        model.set_backend(backend)
    except ValueError as error:
        raise FusionLMError(str(error)) from None
    config = model.config
    if config.fusion == "none":
        if policy is not None:
            raise FusionLMError(f"{name} is unfused: it has no encoding policy")
        return FusionLM(model, tokenizer, None)
    options: dict[str, Any] = {"dtype": encoder_dtype, "device": device, "policy": policy}
    planner = load_planner(config, tokenizer, name, encoder=encoder, **options)
    return FusionLM(model, tokenizer, planner)


def load_model(
    name: str, model_class: type[FusionLMForCausalLM] = FusionLMForCausalLM
) -> tuple[FusionLMForCausalLM, PreTrainedTokenizerBase]:
    """Weights in float32 and tokenizer, without the encoder; `name` and errors as in `load`."""
    shipped = sorted(p.name for p in SHIPPED.iterdir())
    # As with transformers, a folder of that name comes first.
    source = str(SHIPPED / name) if name in shipped and not Path(name).exists() else name
    path = Path(source)
    if not name or (not path.exists() and len(path.parts) == 1):
        raise CheckpointError(
            f"there is no model {name!r}: name a folder, OWNER/NAME on the hub, or one that ships "
            f"({', '.join(shipped)})"
        )
    if (path / "model.onnx").exists() and (path / "manifest.json").exists():
        raise CheckpointError(f"{source} is an export to ONNX: run it with --onnx {source}")
    if path.is_dir() and not (path / "model.safetensors").exists():
        if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pkl")):
            raise CheckpointError(
                f"{source} holds pickled weights, which can run code when loaded: they are never "
                "read; convert them to model.safetensors"
            )
        begun = " (a training run has begun there, and no epoch is finished)"
        is_new = list(path.glob("*.json")) and not (path / "metrics.jsonl").exists()
        raise CheckpointError(
            f"{source} holds no model.safetensors{begun if is_new else ''}: "
            "name a folder that fusion-lm train wrote"
        )
    if path.is_dir():
        check_files(path)
    try:
        config = AutoConfig.from_pretrained(source)
        if not isinstance(config, FusionLMConfig):
            raise CheckpointError(f"{source} is a {config.model_type} model, not a fusion-lm one")
        loaded: Any = model_class.from_pretrained(
            source, config=config, use_safetensors=True, output_loading_info=True
        )
    except CheckpointError:
        raise
    except Exception as error:  # of a damaged file the libraries raise a dozen kinds
        where = "a damaged file" if path.is_dir() else "no such folder, and no hub model reached"
        why = f"{where} ({first_line(error)})"
        raise CheckpointError(f"cannot load the model {source}: {why}") from error
    model: FusionLMForCausalLM = loaded[0]
    for what, names in (("lacks", "missing_keys"), ("has unknown", "unexpected_keys")):
        if loaded[1][names]:
            found = ", ".join(sorted(loaded[1][names]))
            raise CheckpointError(f"{source} {what} weights ({found}): it is damaged")
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"{source} holds NaN or infinity in its weights ({name})")
    tokenizer = load_tokenizer(source)
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
        own = len(tokenizer) if name == "vocab_size" else getattr(tokenizer, name)
        if own != getattr(config, name):
            raise CheckpointError(
                f"the tokenizer in {source} is of another model: its {name} is {own}, the model's "
                f"{getattr(config, name)}"
            )
    return model, tokenizer


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """A saved tokenizer.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
        len(tokenizer), tokenizer("a", return_offsets_mapping=True)
    except Exception as error:  # the libraries raise plain ones, too
        why = first_line(error)
        raise CheckpointError(f"cannot load the tokenizer in {source}: {why}") from error
    return tokenizer
