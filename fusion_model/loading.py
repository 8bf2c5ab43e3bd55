"""Saved models, by folder, hub name, or the name of one that ships."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from fusion_model.attached import load_planner
from fusion_model.config import FusionLMConfig
from fusion_model.devices import resolve_dtype
from fusion_model.errors import CheckpointError, FusionLMError, first_line
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
    source = str(SHIPPED / name) if (SHIPPED / name).is_dir() else name
    path = Path(source)
    if path.is_dir() and not (path / "model.safetensors").exists():
        if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pkl")):
            raise CheckpointError(
                f"{source} holds pickled weights, which can run code when loaded: they are never "
                "read; convert them to model.safetensors"
            )
        begun = " (a training run has begun there, and no epoch is finished)"
        raise CheckpointError(
            f"{source} holds no model.safetensors{begun if list(path.glob('*.json')) else ''}: "
            "name a folder that fusion-lm train wrote"
        )
    try:
        config = AutoConfig.from_pretrained(source)
        if not isinstance(config, FusionLMConfig):
            raise CheckpointError(f"{source} is a {config.model_type} model, not a fusion-lm one")
        loaded: Any = model_class.from_pretrained(
            source, config=config, use_safetensors=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except CheckpointError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        where = "a damaged file" if path.is_dir() else "no such folder, and no hub model reached"
        why = f"{where} ({first_line(error)})"
        raise CheckpointError(f"cannot load the model {source}: {why}") from error
    model: FusionLMForCausalLM = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise CheckpointError(f"{source} lacks weights ({', '.join(missing)}): it is damaged")
    return model, tokenizer
