"""Stage 8: surprisal of the tokens of text; `fusion_model.surprisal` sums them to words."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fusion_model.data.batches import Batch, BatchSource
from fusion_model.model import FusionLMForCausalLM
from fusion_model.surprisal import (
    SentenceScores,
    boundary_ids,
)


@torch.inference_mode()
def token_surprisals(model: FusionLMForCausalLM, batch: Batch) -> list[Tensor]:
    """Surprisals in nats of each sentence of a batch, each on its own."""
    log_probs = model.token_log_probs(batch.input_ids, batch.prefix_embeds, batch.lengths)
    return list((-log_probs).cpu().split((batch.lengths - 1).tolist()))


@torch.inference_mode()
def score_sentences(
    model: FusionLMForCausalLM, source: BatchSource, boundary_ids: Tensor | None = None
) -> list[SentenceScores]:
    """Every sentence on its own, in the corpus' order.

    Args:
        source: the sentences with their embeddings.
        boundary_ids: tokens that start a word, and EOS; see `word_boundary_ids`.
    """
    results: dict[int, SentenceScores] = {}
    for indices in source.plan(8192 if boundary_ids is None else 2048):
        batch = source.batch(indices).to(model.device)
        if boundary_ids is None:
            surprisals = token_surprisals(model, batch)
            results.update(zip(indices.tolist(), map(SentenceScores, surprisals), strict=True))
            continue
        features, _ = model.features(
            batch.input_ids[:, :-1], None, batch.prefix_embeds, use_cache=False
        )
        for row, index in enumerate(indices.tolist()):
            end = int(batch.lengths[row])
            targets = batch.input_ids[row, 1:end]
            results[index] = _sentence_scores(
                model, features[row, : end - 1], targets, boundary_ids
            )
    return [results[i] for i in range(len(source.lengths))]


@torch.inference_mode()
def score_articles(
    model: FusionLMForCausalLM,
    source: BatchSource,
    starts: Sequence[bool],
    boundary_ids: Tensor | None = None,
) -> Iterator[SentenceScores]:
    """As `score_sentences`, but the LSTM's state goes on from one sentence to the next.

    The prefix embedding stays that of the sentence: an article outgrows an encoder's window.

    Args:
        starts: true where an article begins and the state is reset.
    """
    state = None
    for index, first in enumerate(starts):
        batch = source.batch([index]).to(model.device)
        e = batch.prefix_embeds
        if e is not None:  # EOS is read too, on the way to the next sentence
            e = torch.cat([e, e[:, -1:]], dim=1)
        features, state = model.features(
            batch.input_ids, prefix_embeds=e, state=None if first else state
        )
        yield _sentence_scores(model, features[0, :-1], batch.input_ids[0, 1:], boundary_ids)


def _sentence_scores(
    model: FusionLMForCausalLM, features: Tensor, targets: Tensor, boundary_ids: Tensor | None
) -> SentenceScores:
    """Scores of one sentence from features [n + 1, D] and targets [n + 1]."""
    log_probs = torch.log_softmax(model.lm_head(features).float(), dim=-1)
    tokens = -log_probs.gather(1, targets[:, None])[:, 0].cpu()
    if boundary_ids is None:
        return SentenceScores(tokens)
    return SentenceScores(tokens, -log_probs[:, boundary_ids].logsumexp(dim=-1).cpu())


def word_boundary_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """`fusion_model.surprisal.boundary_ids` as a tensor, [K] int64."""
    return torch.tensor(boundary_ids(tokenizer))
