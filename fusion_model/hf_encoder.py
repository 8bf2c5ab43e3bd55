"""Any Hugging Face encoder: equal lengths batched together, several poolings in one pass.

Notation: N items, L tokens each, E width of the encoder.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from fusion_model.encoders import minilm_path
from fusion_model.errors import EncoderError
from fusion_model.items import Progress, TokenItems, equal_lengths, parse_pooling

DTYPES = ("float32", "bfloat16", "float16", "auto")
TOKENS_PER_BATCH = {"cpu": 4096}
TOKENS_PER_BATCH_GPU = 65536
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")


def resolve_dtype(dtype: str, device: torch.device | str) -> torch.dtype:
    """`auto` is bfloat16 where the processor multiplies it in hardware, else float32."""
    if dtype not in DTYPES:
        raise EncoderError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    if dtype != "auto":
        return torch.float32 if dtype == "float32" else getattr(torch, dtype)
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


class HFEncoder(TokenItems):
    """A pretrained encoder with a pooling; see `fusion_model.encoders.Encoder`."""

    def __init__(self, name: str, model: Any, tokenizer: Any, pooling: str = "cls") -> None:
        super().__init__(name, tokenizer, pooling, _window(model.config))
        self.model = model.eval()
        self.dim = model.config.hidden_size * len(self.poolings)
        if "mask" in self.poolings and tokenizer.mask_token_id is None:
            raise EncoderError(f"{name} has no mask token: pooling 'mask' cannot be used")
        if "pooler" in self.poolings and getattr(model, "pooler", None) is None:
            raise EncoderError(f"{name} has no pooler: choose another pooling")
        self.content_sha256 = _content_sha256(model, tokenizer)

    @classmethod
    def load(
        cls,
        name: str,
        pooling: str = "cls",
        *,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
    ) -> "HFEncoder":
        """By hub name, local path or `minilm`: safetensors only, no remote code.

        Raises:
            EncoderError: not found, not safetensors, or not an encoder.
        """
        parse_pooling(pooling)
        torch_dtype = resolve_dtype(dtype, device)
        source = minilm_path() if name == "minilm" else name
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModel.from_pretrained(source, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            reason = next(line for line in str(error).splitlines() if line.strip())
            raise EncoderError(
                f"cannot load the encoder {name!r}: {reason.strip()} (a folder with config.json, "
                "model.safetensors and a tokenizer, a hub name, or minilm)"
            ) from error
        # The hash is taken before the cast: it names the weights, not the precision.
        encoder = cls(name, model, tokenizer, pooling)
        encoder.model = encoder.model.to(device=device, dtype=torch_dtype)
        return encoder

    @property
    def fingerprint(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"hf:{self.content_sha256}:{self.pooling}:{dtype}"

    def save(self, directory: Path) -> None:
        """Nothing to keep: a pretrained encoder is had again by name."""

    @torch.inference_mode()
    def encode(self, items: Sequence[bytes], progress: Progress | None = None) -> Tensor:
        """Vectors, [N, dim] float32 on the CPU, in the order of `items`; duplicates run once."""
        places: dict[bytes, int] = {}
        inverse = [places.setdefault(item, len(places)) for item in items]
        unique = list(places)
        out = torch.empty(len(unique), self.dim)
        budget = TOKENS_PER_BATCH.get(self.model.device.type, TOKENS_PER_BATCH_GPU)
        done = 0
        for rows, ids in equal_lengths(unique, budget):
            out[rows] = self.pooled(torch.from_numpy(ids).to(self.model.device)).float().cpu()
            done += len(rows)
            if progress:
                progress(done, len(unique))
        if not bool(torch.isfinite(out).all()):
            raise EncoderError(
                f"{self.name} gave NaN or infinity in {self.model.dtype}: encode in float32"
            )
        return out if len(unique) == len(items) else out[inverse]

    def pooled(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> [N, dim]."""
        output = None
        if set(self.poolings) - {"static", "mask"}:
            output = self.model(input_ids=ids)
        return torch.cat([self._pool(p, ids, output) for p in self.poolings], dim=-1)

    def _pool(self, pooling: str, ids: Tensor, output: Any) -> Tensor:
        last = ids.shape[1] - self._after - 1  # the text's last token; [CLS] if it is empty
        if pooling == "static":
            return self.model.get_input_embeddings()(ids[:, max(last, 0)])
        if pooling == "mask":
            mask = ids.new_full((ids.shape[0], 1), self.tokenizer.mask_token_id)
            ids = torch.cat([ids[:, : last + 1], mask, ids[:, last + 1 :]], dim=1)
            return self.model(input_ids=ids).last_hidden_state[:, last + 1]
        if pooling == "pooler":
            return output.pooler_output
        hidden = output.last_hidden_state
        if pooling == "mean":
            return hidden.mean(dim=1)
        return hidden[:, {"cls": 0, "last": last, "sep": last + 1}[pooling]]


def _window(config: Any) -> int:
    window = getattr(config, "max_position_embeddings", None) or 10**9
    if config.model_type in OFFSET_POSITIONS:
        window -= (config.pad_token_id or 0) + 1
    return window


def _content_sha256(model: Any, tokenizer: Any) -> str:
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
