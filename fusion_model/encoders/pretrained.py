"""Any Hugging Face encoder: texts of all lengths batched without padding, several poolings in one
pass.

An exact encoding is a tree with nothing after its head (`fusion_model.encoders.incremental`);
transformers' own pass stays as the reference, and for architectures unknown here.

Notation: N texts, L tokens each, E width of the encoder, P poolings besides `static`.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from fusion_model.devices import resolve_dtype
from fusion_model.encoders import batching
from fusion_model.encoders.incremental.passes import TreePass
from fusion_model.encoders.incremental.trees import Tree, grow_trees, similar_sizes
from fusion_model.encoders.inputs import EncoderInput, TokenInputs
from fusion_model.encoders.layers import EncoderLayers
from fusion_model.encoders.pooling import Pooling, parse_pooling, read_of
from fusion_model.encoders.sources import not_loaded, source_of
from fusion_model.errors import EncoderError
from fusion_model.progress import note

TRIED = 4  # texts that our own pass is held against transformers' with
REUSED_KEPT = 4096  # latest vectors of contexts that may be needed again
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")


class HFEncoder(TokenInputs):
    """A pretrained encoder with a pooling; see `fusion_model.encoders.Encoder`.

    Attributes:
        tokens_per_batch: most encoder tokens at once; None for what is enough on the device.
        read: the poolings besides `static`, each with its layer.
        depth: the encoder's layers.
        deepest: the highest layer that is computed.
    """

    tokens_per_batch: int | None = None

    def __init__(
        self, name: str, model: Any, tokenizer: Any, pooling: str = "cls", policy: str = "every"
    ) -> None:
        super().__init__(name, tokenizer, pooling, _window(model.config), policy)
        self.model = model.eval()
        self.dim = model.config.hidden_size * len(self.poolings)
        self._words: Tensor = model.get_input_embeddings().weight
        names = {p.name for p in self.poolings}
        if "mask" in names and tokenizer.mask_token_id is None:
            raise EncoderError(f"{name} has no mask token: pooling 'mask' cannot be used")
        if "pooler" in names and getattr(model, "pooler", None) is None:
            raise EncoderError(f"{name} has no pooler: choose another pooling")
        self.depth: int = model.config.num_hidden_layers
        for p in self.poolings:
            if p.layer > self.depth:
                raise EncoderError(
                    f"{name} has {self.depth} layers: there is no {p.name}@{p.layer}"
                )
        self.read = read_of(self.poolings, self.depth)
        self.deepest: int = max((p.layer for p in self.read), default=0)
        self._layers: EncoderLayers | None = None
        self._tried = False
        self._reused: dict[EncoderInput, Tensor] = {}
        self.content_sha256 = _content_sha256(model, tokenizer)

    @classmethod
    def load(
        cls,
        name: str,
        pooling: str = "cls",
        *,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        policy: str = "every",
        tokens_per_batch: int | None = None,
    ) -> "HFEncoder":
        """By hub name, local path or `minilm`: safetensors only, no remote code.

        Raises:
            EncoderError: not found, not safetensors, or not an encoder.
        """
        parse_pooling(pooling)
        torch_dtype = resolve_dtype(dtype, device)
        source = source_of(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModel.from_pretrained(source, use_safetensors=True)
        except Exception as error:  # of a damaged file the libraries raise a dozen kinds
            raise not_loaded(name, error) from error
        # The hash is taken before the cast: it names the weights, not the precision.
        encoder = cls(name, model, tokenizer, pooling, policy)
        encoder.model = encoder.model.to(device=device, dtype=torch_dtype)
        encoder.tokens_per_batch = tokens_per_batch
        return encoder

    @property
    def fingerprint(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"hf:{self.content_sha256}:{self.pooling}:{dtype}"

    def save(self, directory: Path) -> None:
        """Nothing to keep: a pretrained encoder is had again by name."""

    def forget(self) -> None:
        """Keep no vectors of earlier texts."""
        self._reused.clear()

    @torch.inference_mode()
    def encode(self, inputs: Sequence[EncoderInput]) -> Tensor:
        """Vectors, [N, dim] float32 on the CPU, in the order of `inputs`; duplicates run once.

        Raises:
            EncoderError: the encoder gave NaN or infinity, or memory does not hold a small batch.
        """
        places: dict[EncoderInput, int] = {}
        inverse = [places.setdefault(given, len(places)) for given in inputs]
        read = self._encode_reused if self.holds else self._encode_unique
        out = self.with_static(list(places), read(list(places)))
        if not bool(torch.isfinite(out).all()):
            raise EncoderError(
                f"{self.name} gave NaN or infinity in {self.model.dtype}: encode in float32"
            )
        return out if len(places) == len(inputs) else out[inverse]

    def with_static(self, inputs: Sequence[EncoderInput], read: Tensor | np.ndarray) -> Tensor:
        """Vectors [N, dim] of what was `read` of them, [N, P E] float32, and of `static`."""
        static = None
        if len(self.read) < len(self.poolings):
            last = np.frombuffer(b"".join(map(self.last_id, inputs)), dtype="<i4")
            ids = torch.from_numpy(last.astype(np.int64)).to(self._words.device)
            static = F.embedding(ids, self._words).detach().float().cpu()
        return self._in_order(torch.as_tensor(read), static)

    def _in_order(self, read: Tensor | None, static: Tensor | None) -> Tensor:
        """The columns of [N, P E] and [N, E] in the order of the poolings; None for none."""
        width = self.dim // len(self.poolings)
        parts = iter(() if read is None else read.split(width, dim=1))
        columns = [static if p.name == "static" else next(parts) for p in self.poolings]
        return torch.cat([column for column in columns if column is not None], dim=1)

    def _encode_reused(self, inputs: list[EncoderInput]) -> Tensor:
        """As `_encode_unique`; the latest contexts' vectors are kept."""
        contexts = [given._replace(static=b"") for given in inputs]
        new = [c for c in dict.fromkeys(contexts) if c not in self._reused]
        self._reused.update(zip(new, self._encode_unique(new), strict=True))
        out = torch.stack([self._reused[c] for c in contexts])
        for context in list(self._reused)[:-REUSED_KEPT]:
            del self._reused[context]
        return out

    def _encode_unique(self, inputs: list[EncoderInput]) -> Tensor:
        """What the poolings read of texts, [N, P E] float32 on the CPU. Where memory runs out,
        batches are halved, and what was done is kept."""
        out = torch.empty(len(inputs), len(self.read) * self.model.config.hidden_size)
        waiting = dict.fromkeys(range(len(inputs) if self.read else 0))
        while waiting:
            places = list(waiting)
            try:
                for rows, found in self._batches([inputs[place] for place in places]):
                    done = [places[row] for row in rows]
                    out[done] = found.float().cpu()
                    for place in done:
                        del waiting[place]
            except torch.OutOfMemoryError as error:
                self._shrink(error)
        return out

    @property
    def budget(self) -> int:
        """Most tokens in a batch: `tokens_per_batch`, or what is enough on the device."""
        if self.tokens_per_batch is not None:
            return self.tokens_per_batch
        model = self.model
        width: int = model.config.hidden_size
        return batching.token_budget(model.device.type, width, model.dtype.itemsize)

    def _shrink(self, error: torch.OutOfMemoryError) -> None:
        if self.budget <= batching.LEAST:
            raise EncoderError(
                f"the device's memory does not hold {self.budget} encoder tokens: {error}"
            ) from error
        self.tokens_per_batch = max(self.budget // 2, batching.LEAST)
        note(f"{self.name}: out of memory, going on with {self.tokens_per_batch} tokens a batch")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _batches(self, inputs: list[EncoderInput]) -> Iterator[tuple[list[int], Tensor]]:
        """Places of texts and their vectors [·, P E], batch after batch."""
        if not self._tried:
            self._layers, self._tried = self._proven_layers(inputs), True
        if self._layers is None:
            for rows, ids in batching.equal_lengths([given.ids for given in inputs], self.budget):
                yield rows, self._by_transformers(torch.from_numpy(ids).to(self.model.device))
            return
        trees = grow_trees([self.split(given) for given in inputs], self.after)
        for rows, batch in similar_sizes(trees, self.budget):
            yield rows, self._by_trees(self._layers, batch)

    def _proven_layers(self, inputs: list[EncoderInput]) -> EncoderLayers | None:
        """Our own pass, if some of these texts get the same vectors as from transformers."""
        try:
            layers = EncoderLayers(self.model)
        except ValueError:
            return None
        texts = sorted((self.split(given)[0] for given in inputs), key=len)[-TRIED:]
        device = self.model.device
        reference = [self._by_transformers(torch.tensor([ids], device=device)) for ids in texts]
        expected = torch.cat(reference).float()
        trees = [tree for _, tree in grow_trees([(ids, []) for ids in texts], self.after)]
        found = self._by_trees(layers, trees)
        tolerance = 1e-5 if self.model.dtype == torch.float32 else 2**-4
        allowed = tolerance * float(expected.abs().max().clamp(min=1))
        if bool(expected.isfinite().all()) and float((found - expected).abs().max()) > allowed:
            warnings.warn(
                f"{self.name}: our own pass differs from transformers', which is used instead",
                stacklevel=2,
            )
            return None
        return layers

    def _by_trees(self, layers: EncoderLayers, trees: Sequence[Tree]) -> Tensor:
        """Vectors of exact texts [N, P E]; those with a mask in them are trees of their own."""
        plain = [p for p in self.read if p.name != "mask"]
        masks = [p for p in self.read if p.name == "mask"]
        found: dict[Pooling, Tensor] = {}
        if plain:
            run = TreePass(layers, plain, self.queries, self.after).run
            found |= zip(plain, run(trees), strict=True)
        if masks:
            heads = [self._with_mask(tree.head) for tree in trees]
            of_heads = [Tree(h, [], len(h) - self.after, ends=[-1]) for h in heads]
            run = TreePass(layers, [p._replace(name="last") for p in masks], {}, self.after).run
            found |= zip(masks, run(of_heads), strict=True)
        return torch.cat([found[p] for p in self.read], dim=1)

    def _with_mask(self, ids: list[int]) -> list[int]:
        end = len(ids) - self.after
        return [*ids[:end], self.tokenizer.mask_token_id, *ids[end:]]

    def pooled(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> [N, dim], by transformers alone; ids are those of `EncoderInput`s, and what
        these have for `static` behind them."""
        read = static = None
        if self.read:
            read = self._by_transformers(ids[:, :-1] if self.holds else ids)
        if len(self.read) < len(self.poolings):
            last = -1 if self.holds else max(ids.shape[1] - self.after - 1, 0)
            static = F.embedding(ids[:, last], self._words)
        return self._in_order(read, static)

    def _by_transformers(self, ids: Tensor) -> Tensor:
        """As `_by_trees`, of ids [N, L]: the reference."""
        length, names = ids.shape[1], {p.name for p in self.read}
        end = length - self.after
        outputs: Any = None, None  # of texts, and of texts with a mask
        if names - {"mask"}:
            outputs = self.model(input_ids=ids, output_hidden_states=True), None
        if "mask" in names:
            mask = ids.new_full((ids.shape[0], 1), self.tokenizer.mask_token_id)
            masked = torch.cat([ids[:, :end], mask, ids[:, end:]], dim=1)
            outputs = outputs[0], self.model(input_ids=masked, output_hidden_states=True)
        found = []
        for p in self.read:
            output = outputs[p.name == "mask"]
            hidden: Tensor = output.hidden_states[p.layer]
            if p.name == "pooler":
                found.append(output.pooler_output)
            elif p.name == "mean":
                found.append(hidden.mean(dim=1))
            else:
                node = {"cls": 0, "last": end - 1, "mask": end, "sep": end}[p.name]
                found.append(hidden[:, node])
        return torch.cat(found, dim=1)


@contextmanager
def counted_tokens(encoder: HFEncoder) -> Iterator[list[int]]:
    """A list that gets the number of tokens of each of the encoder's calls."""
    sizes: list[int] = []
    hook = encoder.model.embeddings.register_forward_hook(  # transformers' own pass
        lambda module, args, kwargs, out: sizes.append(kwargs["input_ids"].numel()),
        with_kwargs=True,
    )
    EncoderLayers.sizes = sizes
    try:
        yield sizes
    finally:
        EncoderLayers.sizes = None
        hook.remove()


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
