"""The command line. Each command imports what it needs, so that `--help` answers at once."""

import importlib

from fusion_model.commands.app import app, installed

for _name in ("demo", "inference", "export", "train", "benchmark", "experiment", "kernels"):
    # In the order of `--help`; without PyTorch, nothing is measured.
    if _name != "benchmark" or installed("torch"):
        importlib.import_module(f"fusion_model.commands.{_name}")


def main() -> None:
    """Entry point of `fusion-lm`."""
    app()


if __name__ == "__main__":
    main()
