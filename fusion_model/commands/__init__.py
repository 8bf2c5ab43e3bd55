"""The commands of `fusion-lm`, a file for each kind."""
