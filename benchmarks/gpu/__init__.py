"""What `fusion-lm gpu-check` times, and runs of whole models."""
