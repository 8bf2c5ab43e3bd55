"""Training: the loss is the right one, resumed runs repeat whole ones, processes agree."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES, small_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import fusion_model
from fusion_model.data.text import read_documents
from fusion_model.data.tokenizer import encode_sentences
from fusion_model.errors import CheckpointError, FusionLMError
from fusion_model.training import run as training
from fusion_model.training.run import train


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fusion", ["none", "concat", "init_both"])
def test_a_run_leaves_a_whole_model(fusion: str, options, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    best = train(options(fusion=fusion, epochs=6), out)
    losses = [m["train_loss"] for m in metrics(out)]
    assert losses[-1] < losses[0] - 0.5
    assert (out / "training.png").stat().st_size > 5000
    card = (out / "README.md").read_text()
    assert f"**{best['dev_perplexity']:.2f}**" in card
    assert not list(out.glob("*.bin"))
    lm = fusion_model.load(str(out))
    result = lm.perplexity(read_documents([str(text_file)], "lines"))
    # The store rounds embeddings to float16, scoring does not.
    assert result.perplexity == pytest.approx(best["dev_perplexity"], rel=1e-3)
    assert lm.model.config.fusion == fusion
    assert len(lm.generate("The cat", max_new_tokens=3)) == 1


def test_each_pooling_enters_as_large_as_asked(options, tmp_path: Path) -> None:
    run = options(pooling="static+pooler", prefix_rms=0.07, epochs=1)
    out = tmp_path / "run"
    train(run, out)
    lm = fusion_model.load(str(out))
    vectors = [
        lm.model.prefix_encoder(ids, torch.ones_like(ids), 0)[0, :-1]
        for ids in (torch.tensor([s]) for s in encode_sentences(lm.tokenizer, SENTENCES))
    ]
    e = torch.cat(vectors)  # one prefix of one sentence after the other
    assert not 0.9 < e[:, :16].norm() / e[:, 16:].norm() < 1.1
    scaled = e * lm.model.prefix_scale
    for part in (scaled[:, :16], scaled[:, 16:]):
        assert float(part.square().mean().sqrt()) == pytest.approx(0.07, rel=1e-3)
    train(dataclasses.replace(run, prefix_rms=0.0), tmp_path / "plain")
    assert "prefix_scale" not in weights(tmp_path / "plain")


@pytest.mark.parametrize("fusion", ["add", "gate", "init_hidden"])
def test_what_has_no_weights_of_its_own_is_not_scaled(fusion: str, options, tmp_path: Path) -> None:
    for hidden, scales in ((12, True), (16, False)):  # e is 16 wide
        out = tmp_path / str(hidden)
        train(options(fusion=fusion, hidden_size=hidden, prefix_rms=0.1, epochs=1), out)
        assert ("prefix_scale" in weights(out)) == scales


@pytest.mark.parametrize("name", ["tfidf", "counts", "zeros"])
def test_controls_train_and_load(name: str, options, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    best = train(options(encoder=name, epochs=1), out)
    result = fusion_model.load(str(out)).perplexity(read_documents([str(text_file)], "lines"))
    assert result.perplexity == pytest.approx(best["dev_perplexity"], rel=1e-3)


def test_encoder_vocabulary_and_bfloat16(options, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    best = train(options(vocabulary="encoder", precision="bfloat16", vocab_size=90), out)
    lm = fusion_model.load(str(out))
    assert lm.model.config.shares_vocabulary
    assert lm.model.dtype == torch.float32
    result = lm.perplexity(read_documents([str(text_file)], "lines"))
    assert result.perplexity == pytest.approx(best["dev_perplexity"], rel=2e-2)


@pytest.mark.parametrize("stop_after", [1, 5, 11])
def test_interrupted_run_resumes_to_the_same_result(
    stop_after: int, options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = options(dropout=0.3, prefix_dropout=0.4)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(chosen, whole)
    original, steps = training.TrainingRun.step, []
    before = signal.getsignal(signal.SIGINT)

    def interrupted(self, indices, total):
        steps.append(1)
        if len(steps) == stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, indices, total)

    monkeypatch.setattr(training.TrainingRun, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(chosen, halves)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is before
    best = train(chosen, halves)
    assert_same_weights(whole, halves)
    volatile = ("tokens_per_second", "seconds")
    strip = [{k: v for k, v in m.items() if k not in volatile} for m in metrics(whole)]
    assert strip == [{k: v for k, v in m.items() if k not in volatile} for m in metrics(halves)]
    assert best["dev_loss"] == min(m["dev_loss"] for m in strip)


def test_killed_run_resumes_to_the_same_result(
    options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No farewell: power lost in the middle of an epoch, after a timed checkpoint."""
    chosen = options(dropout=0.3)
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(chosen, whole)
    original, steps = training.TrainingRun.step, []

    def dies(self, indices, total):
        steps.append(1)
        if len(steps) == 5:
            raise RuntimeError("power cut")
        return original(self, indices, total)

    monkeypatch.setattr(training, "SECONDS_PER_CHECKPOINT", 0)
    monkeypatch.setattr(training.TrainingRun, "step", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        train(chosen, halves)
    assert len(list(halves.glob("checkpoint-*"))) == 1
    monkeypatch.undo()
    train(chosen, halves)
    assert_same_weights(whole, halves)


def test_model_is_replaced_in_one_step(
    options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power lost while a better model is being written: the earlier one is still whole."""
    from fusion_model import FusionLMForCausalLM

    out = tmp_path / "run"
    original, saves = FusionLMForCausalLM.save_pretrained, []

    def half_written(self, folder):
        saves.append(1)
        original(self, folder)
        if len(saves) == 2:
            path = Path(folder) / "model.safetensors"
            path.write_bytes(path.read_bytes()[:100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(FusionLMForCausalLM, "save_pretrained", half_written)
    with pytest.raises(CheckpointError, match="run the same command to go on"):
        train(options(), out)
    assert weights(out)
    monkeypatch.undo()
    train(options(), out)
    train(options(), tmp_path / "whole")
    assert_same_weights(out, tmp_path / "whole")


def test_finished_run_is_not_repeated(options, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = train(options(), out)
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    assert train(options(), out) == first
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_finished_run_without_its_checkpoint_stays_finished(options, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = train(options(), out)
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    for checkpoint in out.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert train(options(), out) == first
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp
    (out / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged.*to train anew"):
        train(options(), out)
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: No such file.*to train anew"):
        train(options(), out)


def test_a_backend_that_cannot_run_here_is_refused_first(options, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(FusionLMError, match="'cudnn' cannot run here"):
        train(options(backend="cudnn"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_early_stopping_keeps_the_best(
    options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.2, 1.0])
    monkeypatch.setattr(training, "evaluate_loss", lambda *_: next(losses))
    out = tmp_path / "run"
    best = train(options(epochs=5, patience=2), out)
    assert best["epoch"] == 2
    assert [m["dev_loss"] for m in metrics(out)] == [3.0, 2.0, 2.5, 2.2]


def test_prefix_dropout_schedules(options, tmp_path: Path) -> None:
    rising = options(epochs=5, prefix_dropout_schedule="rising")
    falling = options(epochs=5, prefix_dropout_schedule="falling")
    assert [rising.prefix_dropout_at(e) for e in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [falling.prefix_dropout_at(e) for e in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    train(options(epochs=3, prefix_dropout_schedule="rising"), tmp_path / "run")
    assert [m["prefix_dropout"] for m in metrics(tmp_path / "run")] == [0, 0.5, 1]


def test_full_prefix_dropout_hides_the_embedding() -> None:
    from conftest import small_model

    model = small_model(prefix_dropout=1.0).train()
    ids = torch.randint(3, 30, (2, 4))
    a, b = (model(ids, prefix_embeds=torch.randn(2, 4, 5)).logits for _ in range(2))
    assert torch.equal(a, b)


def test_shared_store_is_encoded_once(
    options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusion_model.encoders.pretrained import HFEncoder

    calls = []
    original = HFEncoder.encode
    monkeypatch.setattr(
        HFEncoder,
        "encode",
        lambda self, items: (calls.append(1), original(self, items))[1],
    )
    train(options(epochs=1), tmp_path / "a", store=tmp_path / "store")
    assert calls
    calls.clear()
    train(options(epochs=1, fusion="add"), tmp_path / "b", store=tmp_path / "store")
    assert not calls


def test_two_processes_give_the_loss_of_one(options, tmp_path: Path) -> None:
    chosen = options(dropout=0.0, prefix_dropout=0.0)
    train(chosen, tmp_path / "one")
    # `accelerate launch --cpu --num_processes 2` would start one.
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    arguments = ["-m", "fusion_model.cli", "train", "--out", str(tmp_path / "two")]
    for field in dataclasses.fields(chosen):
        value, name = getattr(chosen, field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            arguments += [f"--{name}"] if value else []
        else:
            values = value if isinstance(value, tuple) else [value]
            arguments += [part for v in values for part in (f"--{name}", str(v))]
    done = subprocess.run(
        [*launch, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 3
    assert (one[0]["processes"], two[0]["processes"]) == (1, 2)
    for a, b in zip(one, two, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-5)
        assert b["dev_loss"] == pytest.approx(a["dev_loss"], abs=1e-5)
        assert a["step"] == b["step"]


def test_a_killed_process_resumes(options, tmp_path: Path) -> None:
    """SIGKILL in a process of its own, wherever it happens to be."""
    chosen = options(epochs=40, patience=0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(chosen, whole)
    code = (
        "import sys, json; from pathlib import Path\n"
        "from fusion_model.training.options import TrainingOptions\n"
        "from fusion_model.training.run import train\n"
        f"fields = json.loads(Path({str(whole / 'training.json')!r}).read_text())\n"
        "fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}\n"
        f"train(TrainingOptions(**fields), Path({str(killed)!r}))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (killed / "metrics.jsonl").exists() and len(metrics_so_far(killed)) >= 2:
            process.kill()
        time.sleep(0.02)
    process.wait()
    train(chosen, killed)
    assert_same_weights(whole, killed)


def metrics_so_far(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_folders_of_other_runs_are_not_overwritten(options, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(options(epochs=1), out)
    with pytest.raises(CheckpointError, match=r"other settings \(hidden_size, seed\)"):
        train(options(epochs=1, hidden_size=13, seed=1), out)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("…")
    with pytest.raises(CheckpointError, match="holds other files"):
        train(options(), other)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damaged_checkpoint_is_refused_by_name(name: str, options, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(options(epochs=1), out)
    [checkpoint] = out.glob("checkpoint-*")
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=f"{checkpoint.name}.*delete .* to start over"):
        train(options(epochs=1), out)


def test_full_disk_keeps_the_earlier_checkpoint(
    options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusion_model.training import checkpoint

    whole, out = tmp_path / "whole", tmp_path / "run"
    train(options(), whole)
    original, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="the disk is full; the checkpoint before it is kept"):
        train(options(), out)
    assert len(list(out.glob("checkpoint-*"))) == 1
    assert not (out / "checkpoint.tmp").exists()
    monkeypatch.undo()
    train(options(), out)
    assert_same_weights(whole, out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": "sum"}, "unknown fusion 'sum'"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"dropout": 1.5}, "dropout must be at least 0 and below 1"),
        ({"learning_rate": 0.0}, "learning rate must be above 0"),
        ({"view": "left"}, "unknown view 'left'"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
        ({"vocabulary": "encoder", "encoder": "tfidf"}, "has no vocabulary"),
        ({"train_file": ()}, "name at least one --train-file"),
    ],
)
def test_senseless_options_are_named(change: dict[str, Any], message: str, options) -> None:
    with pytest.raises(FusionLMError, match=message):
        options(**change)


def test_learning_rate_rises_then_falls() -> None:
    scales = [training._lr_scale(step, 100, 0.1) for step in range(100)]
    assert scales[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(scales) == 1.0
    assert scales[10:] == sorted(scales[10:], reverse=True)
    assert math.isclose(scales[-1], 0.1, abs_tol=0.01)
    assert len(SENTENCES) == 24  # the runs above rest on several batches an epoch


class _Waits(TorchDispatchMode):
    """Counts operations for which the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        by_mask = name == "aten::index.Tensor" and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        if by_mask or name in ("aten::_local_scalar_dense", "aten::masked_select"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_a_training_step_waits_for_nothing() -> None:
    """But for lengths, which are on the CPU, no shape or branch depends on what is computed."""
    model = small_model(fusion="none").train()
    ids, lengths = torch.randint(3, 30, (3, 7)), torch.tensor([7, 2, 5])
    with _Waits() as waits:
        loss = -model.token_log_probs(ids, None, lengths).sum()
        loss.backward()
    assert not waits.seen
    with _Waits() as waits:
        bool(loss > 0)
    assert waits.seen


@pytest.mark.parametrize("fast", [True, False])
def test_auto_precision_is_bfloat16_only_where_it_is_fast(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A processor without bfloat16 takes a hundred times as long for it."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    with training.autocast("auto", torch.device("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if fast else torch.float32)
