"""The published code's way of training and evaluating, rewritten plainly: the baseline.

One sentence a step. Every prefix of it is a row of its own, one-hot, padded to the sentence's
length, run through the LSTM from the start (arXiv 2208.02402, late concatenation).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PublishedLM(nn.Module):
    """One-hot -> D -> LSTM H -> [h ; e] -> D -> vocabulary; the defaults are the published ones."""

    def __init__(
        self,
        vocab_size: int,
        prefix_size: int = 768,
        embedding_size: int = 512,
        hidden_size: int = 768,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = nn.Linear(vocab_size, embedding_size)
        self.lstm = nn.LSTM(embedding_size, hidden_size, batch_first=True)
        self.projection = nn.Linear(hidden_size + prefix_size, embedding_size)
        self.output = nn.Linear(embedding_size, vocab_size)

    def forward(self, tokens: Tensor, e: Tensor) -> Tensor:
        """Logits of tokens 1..n, [n, V], from `tokens` [n + 1] and `e` [n, E]."""
        n = len(tokens) - 1
        rows = torch.zeros(n, n, self.vocab_size, device=tokens.device)
        for i in range(n):
            rows[i, : i + 1] = F.one_hot(tokens[: i + 1], self.vocab_size)
        hidden, _ = self.lstm(self.embedding(rows))
        last = hidden[torch.arange(n), torch.arange(n)]
        return self.output(self.projection(torch.cat([last, e], dim=1)))
