"""Texts that grow, in shapes and memory that stay: what a CUDA graph can replay.

Vectors are those of `fusion_model.encoders.incremental.stream` to rounding, for poolings `static`,
`last` and `mean`. Keys, values and running sums of all texts lie in one array each; a word that is
split otherwise overwrites its earlier pieces, and padding what nobody has read yet.

Notation: N texts, P nodes of each at once, S places in memory; E width, A heads of width d.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fusion_model.encoders.incremental.attention import bias_of
from fusion_model.encoders.incremental.cache import grown
from fusion_model.encoders.incremental.encoder import IncrementalEncoder
from fusion_model.encoders.inputs import EncoderInput

STEP = 64  # places: attention reads a multiple of it
POOLINGS = ("static", "last", "mean")


class StaticTexts:
    """The texts of a batch, each after the head, which is that of the empty text.

    Args:
        encoder: reads more than `static`, and no pooling but `POOLINGS`.
        count: N.

    Attributes:
        head: nodes of the head: the place of a text's first token.
        window: most nodes of a text, the head's included.
    """

    def __init__(self, encoder: IncrementalEncoder, count: int) -> None:
        self._encoder, self.window = encoder, encoder.window
        device, stream = encoder.model.device, encoder.stream()
        self._empty = torch.as_tensor(stream.encode([EncoderInput(exact=0)])).to(device)
        (entry,) = stream.cache.entries
        self.head = len(entry.head)
        room = self.length(self.window + 1)  # the last place is for padding alone
        self._states = grown(entry.states, 1, room)[:, None].repeat(1, count, 1, 1, 1)
        self._sums = grown(entry.sums, 0, room).repeat(count, 1, 1, 1)  # [N, S, means, E]
        self._rows, self._order = (torch.arange(n, device=device) for n in (count, room))
        after_head = self._order - encoder.after * (self._order >= self.head)
        self._positions = after_head.clamp(max=self.window - 1)

    def length(self, places: int) -> int:
        """So many places with those up to the next `STEP`."""
        return -(-places // STEP) * STEP

    def encode(self, begin: Tensor, count: Tensor, ids: Tensor, length: int) -> Tensor:
        """Vectors [N, dim] float32 of texts with new nodes; what lies before these is known.

        Args:
            begin: the first new node's place, [N].
            count: new nodes of each, [N]; 0 for a text that is empty.
            ids: their tokens, then padding, [N, P].
            length: places that attention reads, all up to the longest text's end at least.
        """
        layers, (texts, width) = self._encoder.layers, ids.shape
        places = begin[:, None] + self._order[:width]
        kept = self._rows[:, None], places.clamp(max=len(self._order) - 1)
        asked, keys = self._positions[kept[1]], self._positions[:length].expand(texts, -1)
        bias = bias_of(self._order[:length] <= places[..., None], asked, keys, layers)

        def attend(number: int, query: Tensor, seen: Tensor) -> Tensor:
            held = self._states[2 * number : 2 * number + 2]  # [2, N, S, A, d]
            held[:, *kept] = seen.unflatten(0, (texts, width)).movedim(2, 0)
            keys, values = held[:, :, :length].transpose(2, 3)
            query = query.unflatten(0, (texts, width)).transpose(1, 2)
            found = F.scaled_dot_product_attention(query, keys, values, bias)
            return found.transpose(1, 2).flatten(0, 1)

        wanted = sorted({p.layer for p in self._encoder.read})
        outputs = layers.run(layers.embed(ids, asked).flatten(0, 1), wanted, attend)
        of_layer = {
            n: o.view(texts, width, -1).float() for n, o in zip(wanted, outputs, strict=True)
        }
        means = sorted({p.layer for p in self._encoder.read if p.name == "mean"})
        ends = self._rows, (count - 1).clamp(min=0)
        parts, read = [], iter(self._encoder.read)
        for p in self._encoder.poolings:
            if p.name == "static":
                words = self._encoder.model.get_input_embeddings().weight
                parts.append(F.embedding(ids[ends], words).float())
                continue
            layer = next(read).layer
            if p.name == "last":
                parts.append(of_layer[layer][ends])
                continue
            sums = self._sums[:, :, means.index(layer)]
            total = of_layer[layer].cumsum(1) + sums[self._rows, begin - 1][:, None]
            sums[kept] = total
            parts.append(total[ends] / (begin + count)[:, None])
        empty = (begin + count == self.head)[:, None]
        return torch.where(empty, self._empty, torch.cat(parts, dim=1))
