"""Mistakes in what a user gave. The command line shows each as one line, without a traceback."""


class FusionLMError(ValueError):
    """What was wrong, where, and what to do about it."""


class TextError(FusionLMError):
    """A text file that cannot be used."""


class EncoderError(FusionLMError):
    """An encoder that cannot be loaded, or an input it cannot encode."""


class TooLong(EncoderError):
    """A text that outgrows the encoder's window."""


class StoreError(FusionLMError):
    """A store of embeddings that is damaged or belongs to another encoder."""


class CheckpointError(FusionLMError):
    """A model or a training checkpoint that is missing, damaged or unsafe."""


class ExportError(FusionLMError):
    """A model that cannot be exported, or an export that cannot be run."""


def first_line(error: Exception) -> str:
    """What another library says went wrong, without the rest of it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
