"""Imports point one way, and the README is true."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = {"kernels": 0, "fusion_model": 1, "export": 2, "benchmarks": 3}


def imports_of(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
    return found


def room(module: str) -> str | None:
    """The top-level folder that a module of the package lives in."""
    parts = module.split(".")
    if parts[0] != "fusion_model":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else "fusion_model"


SOURCES = [p for folder in ORDER for p in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    for module in imports_of(path):
        assert module.split(".")[0] not in (*set(ORDER) - {"fusion_model"}, "tests"), module
        target = room(module)
        if target is None or target == own or path.name.startswith(("cli", "command_line")):
            continue
        assert ORDER[target] < ORDER[own], f"{path} imports {module}"
    if own == "kernels":
        known = {"torch", "triton", "fusion_model", *sys.stdlib_module_names}
        assert {m.split(".")[0] for m in imports_of(path)} <= known


def test_files_are_small() -> None:
    long = [p.name for p in SOURCES if len(p.read_text().splitlines()) > 400]
    assert not long


def test_import_needs_no_triton() -> None:
    """Where triton is installed transformers imports it; ours does not, and works without."""
    code = (
        "import sys; sys.modules['triton'] = None; import fusion_model, fusion_model.model;"
        "assert 'fusion_model.kernels.triton.primitives' not in sys.modules;"
        "from fusion_model.kernels import resolve_backend;"
        "assert resolve_backend('auto', 'cuda', dtype=None, operation='prefix') == 'torch';"
        "resolve_backend('triton', 'cpu')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "triton is not installed" in done.stderr.splitlines()[-1]


def test_transformers_can_be_imported_first_in_the_repository() -> None:
    code = "from transformers import BertModel; import fusion_model; fusion_model.FusionLM"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block-{i}" for i in range(len(BLOCKS))])
def test_readme_python_runs_and_prints_what_it_says(block: str, capsys) -> None:
    code, _, shown = block.partition("\n# prints\n")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    expected = "".join(line.removeprefix("# ") + "\n" for line in shown.splitlines())
    if expected:
        assert capsys.readouterr().out == expected


def test_readme_names_commands_that_exist() -> None:
    from typer.main import get_command

    from fusion_model.cli import app

    known = get_command(app).commands
    used = set(re.findall(r"^(?:\$ )?fusion-lm (\w[\w-]*)", README, re.MULTILINE))
    assert used
    assert used <= set(known)
    for name, command in re.findall(r"fusion-lm ([a-z][\w-]*)([^\n`]*)", README):
        options = set(re.findall(r"--[\w-]+", command))
        assert options <= {o for p in known[name].params for o in p.opts}, (name, options)


def test_readme_table_and_plot_are_the_measured_ones() -> None:
    """`python -m fusion_model.benchmarks.summary` would change nothing."""
    from fusion_model.benchmarks.summary import renew

    text, plots = renew(README, ROOT)
    assert README.count("<!-- from benchmarks/results/") == 1
    assert text == README
    assert len(plots) == 1
    for path, svg in plots.items():
        assert path.read_text() == svg
        assert f"]({path.relative_to(ROOT)})" in README


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    from fusion_model.benchmarks.summary import renew

    wrong = re.sub(r"\*\*\d+×\*\*", "**999×**", README, count=1)
    assert wrong != README
    assert renew(wrong, ROOT)[0] == README
    (path,) = renew(README, ROOT)[1]
    results = path.with_suffix(".jsonl")
    copy = tmp_path / results.relative_to(ROOT)
    copy.parent.mkdir(parents=True)
    faster = re.sub(r'"speedup": [\d.]+', '"speedup": 7.77', results.read_text())
    copy.write_text(faster)
    start, end = README.index("<!-- plot from"), "<!-- end -->"
    plot_only = README[start : README.index(end, start) + len(end)]
    (changed,) = renew(plot_only, tmp_path)[1].values()
    assert changed != path.read_text()
