"""The benchmark of policies runs, and counts what the policies promise."""

import json
from pathlib import Path

import pytest
from fusion_model.benchmarks.policies import main, plot_generation, table

TEXT = "The old gentleman sat down in his chair, and looked at the fire. Nobody spoke at all. " + (
    "When the door opened, a tall stranger came in, shook the rain from his hat, and bowed."
)


@pytest.mark.slow
def test_policies_are_measured(tmp_path: Path, capsys) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    main(text, tmp_path / "out", quick=True)
    results = json.loads((tmp_path / "out" / "policies.json").read_text())
    work = {
        (row["way"], row["pooling"]): row["tokens_per_prefix"]
        for row in results["encoding"]["float32"]
    }
    incremental, refreshed = work["incremental", "mean"], work["incremental+refresh:16", "mean"]
    assert 1 < incremental < 2  # one token each, and each sentence's head
    assert incremental < refreshed < work["every", "mean"]
    assert work["stride:4", "mean"] < work["word", "mean"] <= work["every", "mean"]
    assert len(results["generation"]["incremental"]) == len(results["generation"]["every"]) > 30
    assert table(results) in capsys.readouterr().out
    plot_generation(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
