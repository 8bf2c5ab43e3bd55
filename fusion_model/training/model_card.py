"""What a finished run leaves for people: a plot of its metrics and a model card."""

from pathlib import Path
from typing import Any

from fusion_model.files import write_text
from fusion_model.training.data import TrainingData
from fusion_model.training.options import TrainingOptions


def plot_metrics(epochs: list[dict[str, Any]], out: Path) -> None:
    """Perplexity by epoch, training and dev, from the lines of `metrics.jsonl` to a PNG."""
    import math

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    x = [e["epoch"] for e in epochs]
    axes.plot(x, [math.exp(e["train_loss"]) for e in epochs], "o-", label="training")
    axes.plot(x, [e["dev_perplexity"] for e in epochs], "s-", label="dev")
    best = min(epochs, key=lambda e: e["dev_loss"])
    axes.annotate(
        f"{best['dev_perplexity']:.1f}",
        (best["epoch"], best["dev_perplexity"]),
        xytext=(0, 8),
        textcoords="offset points",
        ha="center",
    )
    axes.set(xlabel="epoch", ylabel="perplexity (per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yscale("log")
    for axis_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_formatter("{x:.0f}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(out, dpi=150)


def write_model_card(
    out: Path, options: TrainingOptions, data: TrainingData, best: dict[str, Any]
) -> None:
    """`README.md` beside the weights: what the model is, its data, and its figures."""
    train, dev = data.train, data.dev
    fused = options.fusion != "none"
    encoder = ""
    if data.encoder is not None:
        seen = f"pooling `{data.encoder.pooling}`, policy `{data.encoder.policy}`"
        encoder = f"{options.encoder}, {seen}, view `{options.view}`"
    extra = "[minilm]" if fused and options.encoder == "minilm" else ""
    rows = {
        "fusion": f"`{options.fusion}`",
        "prefix embeddings": encoder if fused else "none",
        "LSTM": f"{options.num_layers} × {options.hidden_size}, embedding {options.embedding_size}",
        "vocabulary": f"{len(data.tokenizer)} ({options.vocabulary})",
        "training text": f"{len(train.lengths):,} sentences, {(train.lengths - 1).sum():,} tokens",
        "dev text": f"{len(dev.lengths):,} sentences, {(dev.lengths - 1).sum():,} tokens",
        "best epoch": str(best["epoch"]),
        "**dev perplexity** (per token, EOS included)": f"**{best['dev_perplexity']:.2f}**",
        "the paper's `2**nats`": f"{2 ** best['dev_loss']:.2f}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    settings = (out / "training.json").read_text().strip()
    write_text(
        out / "README.md",
        f"""---
library_name: fusion-lm
pipeline_tag: text-generation
---
# A fusion language model

An LSTM language model (arXiv 2208.02402), trained with `fusion-lm train`. It needs the package
fusion-lm; transformers alone does not know the architecture `fusion_lm`. In a clone of fusion-lm:

```sh
pip install ".{extra}" -c constraints.txt
```

```python
import fusion_model  # before transformers' Auto classes, too

lm = fusion_model.load("PATH")
lm.score("The cat sat on the mat.")
```

| | |
|---|---|
{table}

Licence: fusion-lm is Apache-2.0. That of these weights is for whoever trained them to say, as
`license:` at the top: it depends on the training text.

Settings:

```json
{settings}
```
""",
    )
