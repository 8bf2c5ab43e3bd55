"""What is published: a source archive that is whole, and a wheel without what only it needs."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def built(out: Path, *command: str | Path, folder: Path = ROOT) -> Path:
    """The one file that setuptools makes."""
    done = subprocess.run(
        [sys.executable, *command, out], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.iterdir()
    return path


@pytest.mark.slow
def test_archive_is_whole_and_wheel_is_lean(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    names = set(tracked.splitlines())
    if not names:
        pytest.skip("not a clone")
    copy = tmp_path / "copy"
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    made = built(tmp_path / "sdist", "setup.py", "-q", "sdist", "--dist-dir", folder=copy)
    with tarfile.open(made) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert names - inside <= {".gitignore"}
    with zipfile.ZipFile(
        built(tmp_path / "wheel", "-m", "pip", "wheel", "--no-deps", made, "-w")
    ) as wheel:
        files = wheel.namelist()
        (metadata,) = (wheel.read(f).decode() for f in files if f.endswith("/METADATA"))
        size = sum(item.compress_size for item in wheel.infolist())
    packages = [f for f in files if ".dist-info/" not in f]
    assert {f.partition("/")[0] for f in packages} == {"fusion_model"}
    assert not [f for f in packages if re.search(r"/(test_|conftest|results/)", f)]
    shipped = ("kernels/triton/decode.py", "py.typed", "samples/thursday.txt")
    assert {f"fusion_model/{name}" for name in shipped} <= set(packages)
    assert "fusion_model/checkpoints/fusion-lm-small/model.safetensors" in packages
    assert "fusion_model/benchmarks/page/report.css" in packages
    assert size < 13_000_000
    links = re.findall(r"\]\(([^)]*)\)", metadata)
    assert links
    assert all(link.startswith("https://") for link in links)
    assert "License-Expression: Apache-2.0" in metadata
