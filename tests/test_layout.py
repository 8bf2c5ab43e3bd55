"""Imports point one way, files are small, and what needs no library does without."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RANKS = (
    ("kernels",),
    ("errors", "files", "names", "schema", "progress", "devices"),
    ("data",),
    ("encoders",),
    ("prefixes", "planning", "streaming"),
    ("config", "fusion", "attached", "decoding", "growing_token", "generation", "model"),
    ("surprisal", "scoring"),
    ("hashes", "language_model", "loading"),
    ("", "training"),  # "": the package's own file, which names what is public
    ("experiments", "export", "benchmarks"),
    ("commands",),
    ("cli", "__main__"),
)
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}
FOLDERS = ("kernels", "fusion_model", "export", "benchmarks")
SOURCES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]
LIMIT = 370  # lines of a file


def module_of(path: Path) -> str:
    """Its name as imported, without `fusion_model.`: the first part is its room."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(p for p in parts if p not in ("fusion_model", "__init__"))


MODULES = {module_of(path): path for path in SOURCES}


def imports_of(path: Path, lazy: bool = True) -> Iterator[str]:
    """Modules that a file imports; without `lazy` those only that are imported with it."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = f"{node.module}.".removeprefix("fusion_model").removeprefix(".")
            for alias in node.names:
                is_module = inside + alias.name in MODULES
                yield f"{node.module}.{alias.name}" if is_module else str(node.module)
        inner = isinstance(node, ast.FunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        if lazy or not inner:
            waiting += ast.iter_child_nodes(node)


def ours(path: Path, lazy: bool = True) -> set[str]:
    """The modules of this package among them, without `fusion_model.`."""
    found = [m for m in imports_of(path, lazy) if m.partition(".")[0] == "fusion_model"]
    return {m.removeprefix("fusion_model").removeprefix(".") for m in found}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_point_one_way(path: Path) -> None:
    room = module_of(path).partition(".")[0]
    for module in imports_of(path):
        assert module.split(".")[0] not in ("kernels", "export", "benchmarks", "tests"), module
    if room == "":
        return  # it names them all, and imports each when it is asked for
    for module in ours(path):
        other = module.partition(".")[0]
        assert RANK[other] <= RANK[room], f"{path} imports {module}"
        if (room, other) in (("benchmarks", "export"), ("benchmarks", "experiments")):
            continue
        if room in RANKS[-3]:
            assert other == room or other not in RANKS[-3], f"{path} imports {module}"
    if room == "kernels":
        known = {"torch", "triton", "fusion_model", *sys.stdlib_module_names}
        assert {m.split(".")[0] for m in imports_of(path)} <= known


def test_no_circles() -> None:
    """Nor by an import inside a function, but for the public names of a package."""
    graph = {name: ours(path) & set(MODULES) for name, path in MODULES.items()}
    for package in ("", "export"):
        graph[package] = set()
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name] - {name}):
                walk(other, (*above, name))
            done.add(name)

    for name in graph:
        walk(name, ())


TORCH_FREE = (
    "data",
    "encoders",
    "encoders.inputs",
    "encoders.pooling",
    "encoders.policies",
    "encoders.batching",
    "encoders.controls",
    "prefixes",
    "prefixes.views",
    "prefixes.planner",
    "prefixes.embed",
    "prefixes.store",
    "prefixes.stream",
    "scoring",
    "surprisal",
    "export.runtime",
    "benchmarks.measure.machine",
    "benchmarks.profile.profile",
    "benchmarks.profile.report",
)


def test_some_files_need_no_torch() -> None:
    """By themselves, and by all that is imported with them."""
    free = [n for n in MODULES if n in TORCH_FREE or n.startswith(("data.", "export.runtime."))]
    assert len(free) > 20
    waiting, seen = list(free), set(free)
    while waiting:
        name = waiting.pop()
        direct = {m.partition(".")[0] for m in imports_of(MODULES[name], lazy=False)}
        assert not direct & {"torch", "transformers"}, name
        for other in ours(MODULES[name], lazy=False) & set(MODULES) - seen - {""}:
            seen.add(other)
            waiting.append(other)


@pytest.mark.parametrize("option", ["--help", "--version", "train --help"])
def test_help_imports_no_torch(option: str) -> None:
    """As `fusion-lm` starts: which would take seconds."""
    code = (
        f"import sys; sys.argv = {['fusion-lm', *option.split()]}\n"
        "from fusion_model.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'pandas', 'matplotlib', 'sklearn'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "fusion-lm" in done.stdout


def test_files_are_small() -> None:
    long = [p.name for p in SOURCES if len(p.read_text().splitlines()) > LIMIT]
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
    code = (
        "from transformers import AutoConfig, BertModel; import fusion_model; "
        "fusion_model.FusionLM; "
        "AutoConfig.for_model('fusion_lm', vocab_size=5)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
