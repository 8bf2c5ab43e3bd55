"""The command line. Each command imports what it needs, so that `--help` answers at once."""

from fusion_model.commands import export, inference  # noqa: F401  (their commands)
from fusion_model.commands.app import app, installed

if installed("torch"):  # without it, only what runs an exported model is offered
    from fusion_model.commands import benchmark, train  # noqa: F401

from fusion_model.commands import experiment, kernels  # noqa: F401


def main() -> None:
    """Entry point of `fusion-lm`."""
    app()


if __name__ == "__main__":
    main()
