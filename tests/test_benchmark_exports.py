"""What measures exports: every engine, the figures it derives, and the page it writes."""

import json
import math
from pathlib import Path

import pytest
from conftest import SENTENCES
from fusion_model.benchmarks import exports
from fusion_model.export import exporter as exporter_module
from fusion_model.export import verify as verify_module
from fusion_model.export.manifest import PRECISIONS
from onnx_cases import one_thread as one_thread
from onnx_cases import saved_model

import fusion_model
from fusion_model.data.text import read_documents


def test_everything_is_measured_and_the_page_renewed(
    bpe, bert_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_model(tmp_path / "model", bpe, bert_folder, fusion="concat", policy="word")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES[:8]))
    page = tmp_path / exports.PAGE
    page.parent.mkdir()
    page.write_text("Before.\n\n<!-- exports -->\nold\n<!-- end -->\n\nAfter.\n")
    monkeypatch.setattr(exporter_module, "TEXT", text)
    monkeypatch.setattr(verify_module, "TEXT_LIMIT", 10.0)
    monkeypatch.setattr(exports, "checkout", lambda: tmp_path)
    monkeypatch.setattr(exports, "BATCH", 2)
    monkeypatch.setattr(exports, "LENGTH", 3)
    latencies, small = exports.latencies, {"hidden_size": 8}
    monkeypatch.setattr(exports, "latencies", lambda f, t: latencies(f, t, 0.0, **small))
    out = tmp_path / "results" / "run.json"
    exports.main([str(text)], str(folder), 1, out)
    results = json.loads(out.read_text())
    assert results["policy"] == "word"
    for what in ("token", "scoring"):
        assert set(results[what]) == {"torch", *PRECISIONS}
        assert all(own["p50_ms"] > 0 for own in results[what].values())
    found = results["text"]
    expected = fusion_model.load(str(folder)).perplexity(read_documents([str(text)]))
    assert found["torch"]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    for precision in PRECISIONS:
        own = found[precision]
        assert (own["tokens"], own["words"]) == (expected.tokens, expected.words)
        mean, worst = own["mean_error_nats"], own["worst_error_nats"]
        assert abs(math.log(own["perplexity"] / expected.perplexity)) <= mean <= worst
        assert own["model_mb"] >= 0
        assert own["encoder_mb"] > 0
    assert found["fp32"]["worst_error_nats"] < 1e-4 < found["int8"]["worst_error_nats"]
    written = page.read_text()
    assert written.startswith("Before.\n\n<!-- exports from results/run.json -->\n| | a token")
    assert written.endswith("<!-- end -->\n\nAfter.\n")
    assert f"| {expected.perplexity:.2f} |" in written
