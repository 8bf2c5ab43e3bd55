"""Text on standard output as it is made; nothing here needs PyTorch."""

import numpy as np
from fusion_model.export.runtime.tokenizer import TextTokenizer


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
