"""README and docs are true: their Python prints what they say, their commands, options, files and
links exist, their tables are the measured ones."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fusion_model.benchmarks.summary import PAGES, renew
from fusion_model.export import export_model
from test_cli import run

ROOT = Path(__file__).parents[1]
TEXTS = {
    p.relative_to(ROOT).as_posix(): p.read_text()
    for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md")
}
README, GUIDE = TEXTS["README.md"], TEXTS["docs/guide.md"]


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


PYTHON = [
    pytest.param(block, id=f"{page}-{i}")
    for page, text in TEXTS.items()
    for i, block in enumerate(blocks(text, "python"))
]
COMMANDS = [
    pytest.param(line, id=f"{page}: {line[:40]}")
    for page, text in TEXTS.items()
    for block in blocks(text, "sh")
    for line in block.splitlines()
    if line.startswith("fusion-lm ")
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's, where what the pages write does no harm."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "fusion_model").symlink_to(ROOT / "fusion_model")
    return folder


def test_readme_is_a_screen_and_a_half() -> None:
    assert len(README.split()) <= 1100
    assert README.count("![") == 1


@pytest.mark.parametrize("block", PYTHON)
def test_python_prints_what_it_says(block: str, clone: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(clone)
    if "surprisal.tsv" in block and not Path("surprisal.tsv").exists():
        (line,) = (
            p.values[0] for p in COMMANDS if p.id.startswith("docs/guide.md: fusion-lm score")
        )
        assert run(*shlex.split(line)[1:])[0] == 0
    if "OUT/" in block and not Path("OUT").exists():
        export_model("fusion-lm-small", "OUT", encoder=True)
    code, _, shown = block.partition("\n# prints\n")
    exec(compile(code, "page", "exec"), {"__name__": "page"})
    expected = "".join(line.removeprefix("# ") + "\n" for line in shown.splitlines())
    if expected:
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_options_and_files_exist(line: str) -> None:
    from typer.main import get_command

    from fusion_model.cli import app

    known = get_command(app).commands
    _, name, *arguments = shlex.split(line, comments=True)
    options = {a for a in arguments if re.match("--[a-z]", a)}
    assert options <= {o for p in known[name].params for o in p.opts}
    for argument in arguments:
        assert (ROOT / argument).exists() or not argument.startswith("fusion_model/")


def test_commands_in_sentences_exist() -> None:
    from typer.main import get_command

    from fusion_model.cli import app

    known = get_command(app).commands
    found = re.findall(r"fusion-lm ([a-z][\w-]*)([^\n`]*)", "\n".join(TEXTS.values()))
    assert len(found) > 20
    for name, rest in found:
        if name in known:
            options = set(re.findall(r"--[a-z][\w-]*", rest))
            assert options <= {o for p in known[name].params for o in p.opts}, (name, options)


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    for place in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if place.startswith("https://"):
            continue
        name, _, anchor = place.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), place
        titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        assert not anchor or anchor in slugs, place


@pytest.mark.parametrize("page", PAGES)
def test_tables_and_plot_are_the_measured_ones(page: str) -> None:
    """`python -m fusion_model.benchmarks.summary` would change nothing."""
    text, plots = renew(TEXTS[page], ROOT, (ROOT / page).parent)
    assert "from benchmarks/results/" in text
    assert text == TEXTS[page]
    assert len(plots) == (page == "README.md")
    for path, svg in plots.items():
        assert path.read_text() == svg
        assert f"]({path.relative_to(ROOT)})" in text


def test_a_changed_figure_is_noticed(tmp_path: Path) -> None:
    wrong = re.sub(r"\*\*[\d.]+×\*\*", "**999×**", README, count=1)
    assert wrong != README
    assert renew(wrong, ROOT, ROOT)[0] == README
    (path,) = renew(README, ROOT, ROOT)[1]
    results = path.with_suffix(".jsonl")
    copy = tmp_path / results.relative_to(ROOT)
    copy.parent.mkdir(parents=True)
    faster = re.sub(r'"speedup": [\d.]+', '"speedup": 7.77', results.read_text())
    copy.write_text(faster)
    (changed,) = renew(README, tmp_path, tmp_path)[1].values()
    assert changed != path.read_text()


@pytest.mark.slow
def test_training_goes_as_the_guide_shows(clone: Path) -> None:
    """Its lines, but for the figures, which depend on the processor."""
    (block,) = (b for b in blocks(GUIDE, "sh") if "fusion-lm train" in b)
    shown = blocks(GUIDE, "")[0]
    script = block.replace("fusion-lm", f"{sys.executable} -m fusion_model")
    done = subprocess.run(
        ["bash", "-ec", f"exec 2>&1\n{script}"], cwd=clone, capture_output=True, text=True
    )
    figure = re.compile(r"\d+\.\d+|  \(best\)|epoch \d")
    assert figure.sub("", done.stdout) == figure.sub("", shown)
