"""The command line. Each command imports what it needs, so that `--help` answers at once."""

import importlib

from fusion_model.commands.app import INTERRUPTED, app

try:
    for _name in ("demo", "inference", "export", "train", "benchmark", "experiment", "kernels"):
        importlib.import_module(f"fusion_model.commands.{_name}")  # in the order of `--help`
except KeyboardInterrupt:
    raise SystemExit(INTERRUPTED) from None


def main() -> None:
    """Entry point of `fusion-lm`."""
    app()


if __name__ == "__main__":
    main()
