"""A saved model, whole: weights, tokenizer and encoder, with `score`, `perplexity`, `generate`."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase, set_seed

from fusion_model.attached import PrefixCache
from fusion_model.errors import FusionLMError
from fusion_model.files import why_not_written
from fusion_model.hashes import HASHES, write_hashes
from fusion_model.kernels import target_log_probs
from fusion_model.model import FusionLMForCausalLM
from fusion_model.prefixes.planner import PrefixPlanner, check_causal
from fusion_model.prefixes.views import CAUSAL_VIEWS
from fusion_model.scoring import Array, LogProbs, TextModel


class FusionLM(TextModel):
    """A model with its tokenizer and encoder; `fusion_model.load` makes one.

    Attributes:
        model: the `FusionLMForCausalLM`, in evaluation mode.
        tokenizer: adds neither BOS nor EOS by itself.
        planner: prefixes to encoder; None for an unfused model.
    """

    tokens_per_batch = 8192

    def __init__(
        self,
        model: FusionLMForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        planner: PrefixPlanner | None,
    ) -> None:
        self.model, self.tokenizer, self.planner = model.eval(), tokenizer, planner
        self.shuffle = model.config.shuffle
        if planner is not None and planner.view in CAUSAL_VIEWS:
            model.prefix_encoder = PrefixCache(planner)

    @torch.inference_mode()
    def log_probs(
        self, ids: Array, targets: Array, e: Array | None, boundary: Array | None, state: Any
    ) -> LogProbs:
        """See `TextModel`. Without a boundary, the scores of the vocabulary are never kept."""
        model = self.model.eval()
        read, wanted, vectors = to_tensors((ids, targets, e), model.device)
        features, state = model.features(read, prefix_embeds=vectors, state=state)
        features, wanted = features[wanted >= 0], wanted[wanted >= 0]
        if boundary is None:
            head = model.lm_head.weight, model.lm_head.bias
            found = target_log_probs(features, *head, wanted, backend=model.backend)
            return found.cpu().numpy(), None, state
        scores = torch.log_softmax(model.lm_head(features).float(), dim=-1)
        of_boundary = scores[:, torch.from_numpy(boundary)].logsumexp(dim=-1)
        found = scores.gather(1, wanted[:, None])[:, 0]
        return found.cpu().numpy(), of_boundary.cpu().numpy(), state

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `load` needs, with the model's card, and no training state: for a hub.

        Raises:
            FusionLMError: it cannot be written.
        """
        folder = Path(folder)
        card = Path(self.model.name_or_path or "") / "README.md"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / HASHES).unlink(missing_ok=True)  # those of what was there
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            if self.planner is not None:
                encoder: Any = self.planner.encoder
                encoder.save(folder)
            if card.is_file() and card.resolve() != (folder / card.name).resolve():
                shutil.copyfile(card, folder / card.name)
            write_hashes(folder)
        except (OSError, SafetensorError) as error:
            raise FusionLMError(f"cannot write {folder}: {why_not_written(error)}") from error

    def prompt_ids(self, prompt: str) -> Tensor:
        """BOS and the prompt's tokens, [1, T]."""
        return torch.tensor([self.prompt_row(prompt)], device=self.model.device)

    def generate(self, prompt: str, *, seed: int | None = None, **options: Any) -> list[str]:
        """Continuations of a prompt, which they include.

        Args:
            prompt: may be empty.
            seed: for sampling.
            **options: of `transformers.GenerationMixin.generate`: `max_new_tokens`, `do_sample`,
                `temperature`, `top_k`, `top_p`, `num_beams`, `num_return_sequences`, `streamer`, …

        Raises:
            FusionLMError: the model's view sees the future.
        """
        check_causal(self.planner)
        if seed is not None:
            set_seed(seed)
        ids = self.prompt_ids(prompt)
        try:
            out = self.model.eval().generate(ids, attention_mask=torch.ones_like(ids), **options)
        except ValueError as error:
            raise FusionLMError(f"cannot generate: {error}") from error
        texts: list[str] = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return texts


def to_tensors(arrays: Iterable[np.ndarray | None], device: torch.device) -> list[Any]:
    """Arrays, such as those of a `Batch`, on a device; None of None.

    A GPU is not waited for.
    """
    found = [None if a is None else torch.from_numpy(a) for a in arrays]
    if device.type == "cuda":
        found = [None if t is None else t.pin_memory() for t in found]
    return [None if t is None else t.to(device, non_blocking=True) for t in found]
