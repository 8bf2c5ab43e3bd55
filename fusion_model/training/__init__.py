"""Training: options, data, the run with its checkpoints, and the model card."""
