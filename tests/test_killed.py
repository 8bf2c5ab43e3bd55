"""Killed, crowded or out of room at any moment: what is run again ends as if nothing had been."""

import json
import multiprocessing
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES
from onnx_cases import saved_model
from test_experiments import TOY

pytestmark = pytest.mark.slow
KILLS = 20
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        *("test_killed", "fusion_model.training.run", "fusion_model.cli"),
        *("fusion_model.experiments.runner", "fusion_model.benchmarks.suite.bench"),
    ]
)
Job = tuple[str, Any]


def run(job: Job, log: str, room: int | None) -> None:
    """A job in a process of its own; with `room`, no file grows beyond so many bytes."""
    said = open(log, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    sys.stdout = sys.stderr = said if room is None else StringIO()
    torch.set_num_threads(1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        work(*job)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if isinstance(sys.stderr, StringIO):
            said.write(sys.stderr.getvalue())


def work(kind: str, given: Any) -> None:
    """What a process is for."""
    if kind == "command":
        from fusion_model import cli
        from fusion_model.experiments.sizes import SIZES
        from fusion_model.training import run as training

        SIZES["toy"] = TOY
        training.SECONDS_PER_CHECKPOINT = 0  # type: ignore[misc]
        sys.argv[1:] = given
        cli.app(given)


def start(job: Job, log: Path, room: int | None = None) -> Any:
    process = FORKED.Process(target=run, args=(job, str(log), room))
    process.start()
    return process


def finish(job: Job, log: Path, room: int | None = None) -> int:
    process = start(job, log, room)
    process.join(600)
    assert process.exitcode is not None
    return int(process.exitcode)


def contents(folder: Path, *leave: str) -> dict[str, bytes]:
    """Every file under a folder, but for those with such a name."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not any(name in str(p) for name in leave)
    }


def of_training(out: Path) -> Any:
    """All but what depends on time."""
    timed = ("metrics.jsonl", "training.png", "README.md", ".lock")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    volatile = ("tokens_per_second", "seconds")
    state = json.loads(next(out.glob("checkpoint-*/state.json")).read_text())
    return (
        contents(out, *timed, "state.json"),
        [{k: v for k, v in line.items() if k not in volatile} for line in lines],
        {k: v for k, v in state.items() if k not in ("seconds", "checksum")},
    )


def of_export(out: Path) -> Any:
    return contents(out)


def of_experiment(out: Path) -> Any:
    return contents(out / "results"), (out / "schedule" / "report.md").read_text()


def of_bench(out: Path) -> Any:
    """Times differ: results can be read, and the page is whole."""
    from fusion_model.benchmarks.measure import records

    [path] = (out / "results").glob("*.jsonl")
    page = (out / "page.html").read_text()
    last = records.read(path)[-1][1]
    return [(r["kind"], r["group"], r["backend"]) for r in last], page.rstrip().endswith("</html>")


@pytest.fixture(scope="module")
def jobs(
    tmp_path_factory: pytest.TempPathFactory, bpe, bert_folder: Path
) -> dict[str, tuple[Callable[[Path], Job], Callable[[Path], Any]]]:
    """Of each kind: what is run for a folder, and what of the folder must be the same."""
    root = tmp_path_factory.mktemp("jobs")
    text = root / "text.txt"
    text.write_text("\n".join(SENTENCES) + "\n")
    data = root / "data"
    (data / "brown").mkdir(parents=True)
    for name in "abc":
        (data / "brown" / f"{name}.txt").write_text("\n".join(SENTENCES) + "\n")
    model = saved_model(root / "model", bpe, bert_folder, fusion="concat")
    encoder = ["--encoder", str(bert_folder), "--pooling", "mean", "--split", "lines"]
    sizes = ["--vocab-size", "300", "--embedding-size", "8", "--hidden-size", "12"]
    sizes += ["--epochs", "4", "--tokens-per-batch", "64", "--patience", "0"]
    files = ["--train-file", str(text), "--dev-file", str(text)]
    toy = ["--data", str(data), "--encoder", str(bert_folder), "--size", "toy", "--seeds", "1"]
    shape = ["--hidden-size", "16", "--batch", "1", "--length", "4", "--device", "cpu"]

    def command(*arguments: str, to: str = "--out") -> Callable[[Path], Job]:
        return lambda out: ("command", [*arguments, *([to] if to else []), str(out)])

    def bench(out: Path) -> Job:
        out.mkdir(exist_ok=True)
        paths = ["--results", str(out / "results"), "--report", str(out / "page.html")]
        one = ["--only", "sequence", "--backend", "torch"]  # and plain PyTorch, beside it
        return "command", ["bench", "--quick", *one, *shape, *paths]

    return {
        "train": (command("train", *files, *encoder, *sizes), of_training),
        "embed": (
            command("embed", "--text", str(text), *encoder, "--vocab-size", "300"),
            lambda out: contents(out, ".lock"),
        ),
        "export": (command("export", str(model), "--encoder", to=""), of_export),
        "experiment": (command("experiment", "schedule", *toy), of_experiment),
        "bench": (bench, of_bench),
    }


NAMES = ("train", "embed", "export", "experiment", "bench")


@pytest.fixture
def whole(request: pytest.FixtureRequest, jobs, tmp_path: Path) -> tuple[Any, float]:
    """What a job that nothing disturbs leaves, and how long it takes."""
    job, read = jobs[request.node.callspec.params["name"]]
    finish(("nothing", None), tmp_path / "log")  # what is imported for the first is there then
    began = time.monotonic()
    assert finish(job(tmp_path / "whole"), tmp_path / "log") == 0, (tmp_path / "log").read_text()
    return read(tmp_path / "whole"), time.monotonic() - began


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_moments(name: str, jobs, whole, tmp_path: Path) -> None:
    job, read = jobs[name]
    expected, seconds = whole
    moments, log = random.Random(name), tmp_path / "log"
    out, runs, kills, resumed = tmp_path / "killed0", 0, 0, 0
    while kills < KILLS:
        process = start(job(out), log)
        process.join(moments.uniform(0.05, 1) * seconds)
        if process.exitcode is None:
            process.kill()
            kills += 1
            resumed += out.exists()
        process.join()
        if process.exitcode == 0 or kills == KILLS:
            assert process.exitcode == 0 or finish(job(out), log) == 0, log.read_text()[-3000:]
            assert read(out) == expected
            shutil.rmtree(out)
            runs += 1
            out = tmp_path / f"killed{runs}"
    assert "Traceback" not in log.read_text()
    print(f"{name}: {kills} kills, {resumed} with something begun, {runs} runs equal")


@pytest.mark.parametrize("name", NAMES[:3])
def test_two_on_one_folder(name: str, jobs, whole, tmp_path: Path) -> None:
    job, read = jobs[name]
    out, logs = tmp_path / "shared", [tmp_path / "a", tmp_path / "b"]
    both = [start(job(out), log) for log in logs]
    for process in both:
        process.join(600)
    codes = {process.exitcode for process in both}
    said = "".join(log.read_text() for log in logs)
    assert codes <= {0, 1}
    assert 0 in codes
    assert "Traceback" not in said
    assert codes == {0} or "in use by another process" in said
    assert finish(job(out), tmp_path / "c") == 0
    assert read(out) == whole[0]


@pytest.mark.parametrize("name", NAMES[:4])
def test_no_room(name: str, jobs, whole, tmp_path: Path) -> None:
    """Every size of file in turn is one too many; each time one line, then all goes on."""
    job, read = jobs[name]
    sizes = sorted(p.stat().st_size for p in (tmp_path / "whole").rglob("*") if p.is_file())
    chosen = sorted({sizes[i * (len(sizes) - 1) // 5] - 1 for i in range(6)} - {-1})
    for number, room in enumerate(chosen):
        out, log = tmp_path / f"full{number}", tmp_path / f"log{number}"
        code = finish(job(out), log, room)
        assert code == 1, (room, log.read_text())
        assert "Traceback" not in log.read_text(), (room, log.read_text())
        assert log.read_text().splitlines()[-1].startswith("error: "), (room, log.read_text())
        assert finish(job(out), log) == 0, (room, log.read_text())
        assert read(out) == whole[0]


@pytest.mark.parametrize("name", NAMES[:3])
def test_folders_that_cannot_be_written_to(name: str, jobs, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for out in (Path("/proc/out"), file / "out"):
        log = tmp_path / f"log{out.parent.name}"
        assert finish(jobs[name][0](out), log) == 1
        said = log.read_text().splitlines()
        assert said[-1].startswith("error: ")
        assert not any("Traceback" in line for line in said)
    assert file.read_text() == "x"
