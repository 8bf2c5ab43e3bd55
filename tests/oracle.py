"""The paper's model, once more: numpy, float64, one prefix at a time, from the equations.

Shares no code with the package. Token i is predicted from the LSTM's state after x[0..i-1] and
from e[i - 1], the embedding of x[0..i-1] (arXiv 2208.02402, section 3; Hochreiter &
Schmidhuber's cell with a forget gate, PyTorch's order of gates: i, f, g, o).
"""

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def logits_of_prefix(
    weights: dict[str, np.ndarray], fusion: str, tokens: list[int], e: np.ndarray | None, all_e
) -> np.ndarray:
    """Scores of the token after `tokens`; e embeds them, all_e[t] embeds tokens[: t + 1]."""
    layers = sum(name.startswith("lstm.weight_ih") for name in weights)
    hidden = weights["lstm.weight_hh_l0"].shape[1]
    if "prefix_scale" in weights:
        e, all_e = weights["prefix_scale"] * e, weights["prefix_scale"] * all_e
    projected = e
    if "prefix_projection.weight" in weights:
        projected = weights["prefix_projection.weight"] @ e + weights["prefix_projection.bias"]
    zeros = np.zeros(hidden)
    h = [projected if fusion in ("init_hidden", "init_both") else zeros for _ in range(layers)]
    c = [projected if fusion in ("init_cell", "init_both") else zeros for _ in range(layers)]
    for t, token in enumerate(tokens):
        x = weights["embed_tokens.weight"][token]
        if fusion == "input":
            x = np.concatenate([x, all_e[t]])
        for k in range(layers):
            gates = (
                weights[f"lstm.weight_ih_l{k}"] @ x
                + weights[f"lstm.bias_ih_l{k}"]
                + weights[f"lstm.weight_hh_l{k}"] @ h[k]
                + weights[f"lstm.bias_hh_l{k}"]
            )
            i, f, g, o = np.split(gates, 4)
            c[k] = sigmoid(f) * c[k] + sigmoid(i) * np.tanh(g)
            h[k] = sigmoid(o) * np.tanh(c[k])
            x = h[k]
    if fusion == "concat":
        x = np.concatenate([x, e])
    elif fusion == "add":
        x = x + projected
    elif fusion == "multiply":
        x = x * projected
    elif fusion == "gate":
        both = np.concatenate([x, projected])
        gate = sigmoid(weights["gate.weight"] @ both + weights["gate.bias"])
        x = gate * x + (1 - gate) * projected
    features = weights["projection.weight"] @ x + weights["projection.bias"]
    return weights["lm_head.weight"] @ features + weights["lm_head.bias"]


def all_logits(model, tokens: list[int], e: np.ndarray | None) -> np.ndarray:
    """[T, V]: row t scores token t + 1. `e` is [T, E], or [E] for one vector a sequence."""
    weights = {k: v.double().numpy() for k, v in model.state_dict().items()}
    if e is not None and e.ndim == 1:
        e = np.stack([e] * len(tokens))
    return np.stack(
        [
            logits_of_prefix(
                weights, model.config.fusion, tokens[: t + 1], None if e is None else e[t], e
            )
            for t in range(len(tokens))
        ]
    )
