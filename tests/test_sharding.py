"""Several processes fill one store."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SENTENCES
from onnx_cases import saved_model
from test_cli import run

from fusion_model.encoders import load_encoder
from fusion_model.prefixes.distributed import share_of


def launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two gloo processes."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("policy", ["every", "incremental"])
def test_two_processes_fill_the_store_of_one(
    policy: str, bert_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = ["embed", "--text", text_file, "--encoder", bert_folder, "--policy", policy]
    arguments += ["--split", "lines", "--vocab-size", "300", "--store-dtype", "float32"]
    code, stdout, _ = run(*arguments, "--out", tmp_path / "one")
    assert code == 0
    done = launch("-m", "fusion_model.cli", *arguments, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith(stdout.split(": ")[1].strip())
    one, two = ((tmp_path / name) for name in ("one", "two"))
    assert (one / "keys.bin").read_bytes() == (two / "keys.bin").read_bytes()
    vectors = [np.fromfile(store / "vectors.bin", dtype="<f4") for store in (one, two)]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    chunks = [json.loads((s / "manifest.json").read_text())["chunks"] for s in (one, two)]
    assert [c[0] for c in chunks[0]] == [c[0] for c in chunks[1]]


def test_two_processes_score_as_one(bpe, bert_folder: Path, tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model", bpe, bert_folder, fusion="concat")
    for i, sentences in enumerate((SENTENCES[:3], SENTENCES[3:4], SENTENCES[4:8])):
        path = tmp_path / "texts" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(sentences))
    arguments = ["score", folder, "--text", tmp_path / "texts", "--split", "lines"]
    code, one, _ = run(*arguments, "--store", tmp_path / "one")
    assert code == 0
    store = tmp_path / "two"
    done = launch("-m", "fusion_model.cli", *arguments, "--store", store)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, expected = ([r.split("\t") for r in t.splitlines()] for t in (done.stdout, one))
    assert [r[:4] + r[6:] for r in rows] == [r[:4] + r[6:] for r in expected]
    found = [float(r[5]) for r in rows[1:]]
    assert found == pytest.approx([float(r[5]) for r in expected[1:]], abs=1e-4)
    assert (store / "vectors.bin").stat().st_size > 0


@pytest.mark.slow
def test_two_processes_evaluate_as_one(bpe, bert_folder: Path, text_file: Path, tmp_path) -> None:
    """Of one document, which one of them has."""
    folder = saved_model(tmp_path / "model", bpe, bert_folder, fusion="concat")
    arguments = ["evaluate", folder, "--text", text_file, "--split", "lines", "--json"]
    done = launch("-m", "fusion_model.cli", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = (json.loads(shown) for shown in (done.stdout, run(*arguments)[1]))
    for name in ("model", "text"):
        assert two.pop(name) == one.pop(name)
    assert two == pytest.approx(one, rel=1e-6)


FAILING = """
import sys, torch.distributed as dist
from fusion_model.errors import EncoderError
from fusion_model.encoders.controls import ZeroEncoder
from fusion_model.encoders.inputs import EncoderInput
from fusion_model.prefixes.distributed import shared_encoding
dist.init_process_group("gloo")
rank = dist.get_rank()
encoder = ZeroEncoder(4)
asked = []
plain = encoder.encode
def encode(inputs):
    asked.append(len(inputs))
    if rank and EncoderInput(text="bad") in inputs:
        raise EncoderError("gave NaN")
    return plain(inputs)
encoder.encode = encode
try:
    with shared_encoding(encoder, rank, 2) as together:
        if rank == 0:
            assert together([EncoderInput(text="a")] * 5).shape == (5, 4)
            together([EncoderInput(text="bad")] * 4)
except EncoderError as error:
    print("main saw:", error)
sys.stdout.flush()
dist.destroy_process_group()
sys.stdout.write(f"rank {rank} encoded {sum(asked)}\\n")
"""


def test_every_process_works_and_a_failure_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = launch(script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "main saw: process 1: gave NaN" in done.stdout
    counts = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert counts == ["rank 0 encoded 5", "rank 1 encoded 4"]


def test_shares_are_neighbours_of_equal_work(bert_folder: Path) -> None:
    encoder = load_encoder(str(bert_folder), "mean")
    inputs = encoder.inputs_from_texts([s[:n] for s in SENTENCES[:5] for n in range(len(s))])
    for world in (1, 2, 3, 7):
        shares = [share_of(inputs, rank, world) for rank in range(world)]
        assert shares[0][0] == 0
        assert shares[-1][1] == len(inputs)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))
        work = [sum(len(given.ids) for given in inputs[a:b]) for a, b in shares]
        assert max(work) - min(work) <= 2 * max(len(given.ids) for given in inputs)
    assert share_of([], 1, 2) == (0, 0)
