"""A saved tokenizer without transformers: what this package uses of `PreTrainedTokenizerFast`.

Nothing here needs PyTorch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fusion_model.errors import ExportError

SPECIALS = ("pad", "bos", "eos", "unk", "mask")


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """What `TextTokenizer` needs beside `tokenizer.json`, of a transformers tokenizer."""
    return {
        "special_ids": sorted(set(tokenizer.all_special_ids)),
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in SPECIALS},
    }


class TextTokenizer:
    """A `tokenizers.Tokenizer` with the names that transformers gives to its parts.

    Args:
        path: a `tokenizer.json`.
        described: by `describe_tokenizer`.

    Raises:
        ExportError: it cannot be read.
    """

    def __init__(self, path: Path, described: dict[str, Any]) -> None:
        try:
            self.backend_tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ExportError(f"cannot read the tokenizer {path}: {error}") from error
        self.backend_tokenizer.no_truncation()
        self.backend_tokenizer.no_padding()
        self.all_special_ids: list[int] = described["special_ids"]
        self.pad_token_id: int | None = described["pad_token_id"]
        self.bos_token_id: int | None = described["bos_token_id"]
        self.eos_token_id: int | None = described["eos_token_id"]
        self.unk_token_id: int | None = described["unk_token_id"]
        self.mask_token_id: int | None = described["mask_token_id"]
        mask = self.mask_token_id
        self.mask_token = None if mask is None else self.backend_tokenizer.id_to_token(mask)

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        **options: Any,
    ) -> dict[str, Any]:
        """`input_ids` and `offset_mapping` of a text, or lists of them."""
        self.backend_tokenizer.encode_special_tokens = split_special_tokens
        if isinstance(text, str):
            one = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
            return {"input_ids": one.ids, "offset_mapping": one.offsets}
        several = self.backend_tokenizer.encode_batch(
            list(text), add_special_tokens=add_special_tokens
        )
        return {
            "input_ids": [encoding.ids for encoding in several],
            "offset_mapping": [encoding.offsets for encoding in several],
        }

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        vocabulary: dict[str, int] = self.backend_tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """The pieces of text that ids stand for."""
        return [str(self.backend_tokenizer.id_to_token(int(i))) for i in ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids."""
        plain = [int(i) for i in ids]
        text: str = self.backend_tokenizer.decode(plain, skip_special_tokens=skip_special_tokens)
        return text


class TokenPrinter:
    """Prints words once they are whole: a token may be a part of a word, or of a character.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer, self._ids, self._shown = tokenizer, list[int](), 0

    def put(self, ids: np.ndarray) -> None:
        """New tokens of the row, the prompt's first."""
        self._ids += ids.tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        end = text.rfind(" ") + 1
        if end > self._shown:
            print(text[self._shown : end], end="", flush=True)
            self._shown = end

    def end(self) -> None:
        """No token follows."""
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        print(text[self._shown :], flush=True)
