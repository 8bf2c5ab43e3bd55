"""Operations behind one `backend=` choice. They know PyTorch, and Triton where it is installed.

Notation: B sequences, T steps, R prefix rows, D input width, H hidden width, V vocabulary,
L layers. Gates are in PyTorch's order: input, forget, cell, output.
"""

# Python run in the repository's root finds this folder as `kernels`, too, and transformers then
# imports it, taking it for the PyPI package of that name: under that name it is empty.
if __name__ != "kernels":
    from fusion_model.kernels.backend import BACKENDS, compute_dtype, resolve_backend
    from fusion_model.kernels.dropout import dropout
    from fusion_model.kernels.linear_cross_entropy import target_log_probs
    from fusion_model.kernels.lstm import LayerWeights, State, lstm_sequence, lstm_tokens
    from fusion_model.kernels.prefix_lstm import prefix_lstm

__all__ = [
    "BACKENDS",
    "LayerWeights",
    "State",
    "compute_dtype",
    "dropout",
    "lstm_sequence",
    "lstm_tokens",
    "prefix_lstm",
    "resolve_backend",
    "target_log_probs",
]
