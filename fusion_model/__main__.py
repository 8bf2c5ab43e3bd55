"""`python -m fusion_model` is `fusion-lm`."""

from fusion_model.cli import main

main()
