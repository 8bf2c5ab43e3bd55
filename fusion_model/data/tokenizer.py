"""Stage 2: tokenizers, trained on the training sentences or cut from the encoder's own.

Neither adds BOS by itself: clients that count on their own (lm-eval, minicons) would count it
twice. `encode_sentences` adds BOS and EOS.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fusion_model.errors import EncoderError, TextError

if TYPE_CHECKING:  # encoding text works without transformers, see fusion_model.export
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
LARGEST = 2**24  # tokens of a vocabulary: the trainer takes memory for them all
CHUNK = 1000  # sentences tokenised at once
AS_TEXT = {"add_special_tokens": False, "split_special_tokens": True}  # `</s>` is text
SPECIALS = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}


def train_bpe(sentences: Iterable[str], vocab_size: int = 8192) -> "PreTrainedTokenizerFast":
    """Byte-level BPE, ids 0, 1, 2 being padding, BOS and EOS.

    On small text the trainer runs out of merges early; the vocabulary is then smaller than
    asked, which is logged.
    """
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size > LARGEST:
        raise TextError(f"a vocabulary has at most {LARGEST:,} tokens here, not {vocab_size:,}")
    if vocab_size < len(alphabet) + len(SPECIALS):
        raise TextError(
            f"a byte-level vocabulary has at least {len(alphabet) + len(SPECIALS)} tokens: "
            f"ask for more than {vocab_size}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences, trainer)
    if bpe.get_vocab_size() < vocab_size:
        logger.warning(
            "the text is too small for %d tokens: the vocabulary has %d",
            vocab_size,
            bpe.get_vocab_size(),
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **SPECIALS)


def cut_vocabulary(
    encoder_tokenizer: "PreTrainedTokenizerBase", sentences: Sequence[str], vocab_size: int
) -> "PreTrainedTokenizerFast":
    """The encoder's WordPiece vocabulary, cut to its `vocab_size` most frequent pieces.

    Single characters stay, so that rare words fall into smaller pieces and none is lost. Every
    token is a piece of the encoder's, hence a prefix of tokens is one for the encoder too.

    Raises:
        EncoderError: the encoder's tokenizer is not WordPiece.
    """
    from transformers import PreTrainedTokenizerFast

    backend = getattr(encoder_tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, models.WordPiece):
        raise EncoderError(
            "only a WordPiece vocabulary (BERT, MiniLM, DistilBERT, …) can be cut: this "
            "encoder has another kind, so train BPE instead (--vocabulary bpe)"
        )
    unknown = str(encoder_tokenizer.unk_token)
    counts: Counter[str] = Counter()
    for start in range(0, len(sentences), CHUNK):
        chunk = list(sentences[start : start + CHUNK])
        for encoding in backend.encode_batch(chunk, add_special_tokens=False):
            counts.update(encoding.tokens)
    counts.pop(unknown, None)
    alphabet = {c for piece in counts for c in piece.removeprefix("##")}
    known = encoder_tokenizer.get_vocab()
    single = [p for c in sorted(alphabet) for p in (c, "##" + c) if p in known]
    pieces = dict.fromkeys([PAD, BOS, EOS, unknown, *single])
    for piece, _ in counts.most_common():
        if len(pieces) >= vocab_size:
            break
        pieces[piece] = None
    specification = json.loads(backend.to_str())
    specification["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
    specification |= {"post_processor": None, "added_tokens": [], "truncation": None}
    specification["padding"] = None
    cut = Tokenizer.from_str(json.dumps(specification))
    return PreTrainedTokenizerFast(tokenizer_object=cut, unk_token=unknown, **SPECIALS)


def encoder_ids(
    tokenizer: "PreTrainedTokenizerBase", encoder_tokenizer: "PreTrainedTokenizerBase"
) -> np.ndarray:
    """For each token of a cut vocabulary its id in the encoder's, [V] int32 (-1: none)."""
    known = encoder_tokenizer.get_vocab()
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([known.get(piece, -1) for piece in pieces], dtype=np.int32)


def encode_sentences(
    tokenizer: "PreTrainedTokenizerBase", sentences: Sequence[str], max_tokens: int | None = None
) -> list[list[int]]:
    """`BOS … EOS` ids of each sentence; one of over `max_tokens` tokens becomes several."""
    encoded = []
    for start in range(0, len(sentences), CHUNK):
        chunk = list(sentences[start : start + CHUNK])
        for ids in tokenizer(chunk, **AS_TEXT)["input_ids"]:
            step = max_tokens or max(len(ids), 1)
            for first in range(0, max(len(ids), 1), step):
                piece = ids[first : first + step]
                encoded.append([tokenizer.bos_token_id, *piece, tokenizer.eos_token_id])
    return encoded
