"""Checks of the kernels: what they compile to without a GPU, and whether a GPU runs them right."""
