"""Shared by the suites: which cases, what machine this is, and where results go."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_model.benchmarks.measure import records as results
from fusion_model.benchmarks.measure.ceilings import Ceilings, measure_ceilings
from fusion_model.benchmarks.measure.machine import describe
from fusion_model.benchmarks.suite.bench import BUDGETS, affordable, context_of
from fusion_model.benchmarks.suite.cases import SUITES, cases
from fusion_model.benchmarks.suite.work import Context
from transformers.utils import logging

logging.disable_progress_bar()
logging.set_verbosity_error()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=SUITES, help="shapes (default: quick; tiny if disabled)")
    parser.addoption("--keep", type=Path, help="folder for results (default: out/bench)")


def suite_of(config: pytest.Config) -> str:
    disabled = config.getoption("--benchmark-disable") and not config.getoption(
        "--benchmark-enable"
    )
    chosen: str = config.getoption("--suite") or ("tiny" if disabled else "quick")
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "group" in metafunc.fixturenames:
        chosen = affordable(cases(suite_of(metafunc.config)), DEVICE)
        groups = {name: list(members) for name, members in groupby(chosen, lambda c: c.group)}
        metafunc.parametrize("group", groups.values(), ids=groups)


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    machine_info |= describe(DEVICE)


@pytest.fixture(scope="session")
def budget(request: pytest.FixtureRequest) -> float:
    """Seconds of samples a case."""
    return BUDGETS[suite_of(request.config)]


@pytest.fixture(scope="session")
def context(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Context:
    scratch = tmp_path_factory.mktemp("bench")
    return context_of("fusion-lm-small", (), DEVICE, suite_of(request.config), scratch)


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest, budget: float) -> Ceilings:
    dtypes = {c.dtype for c in affordable(cases(suite_of(request.config)), DEVICE)} | {"int8"}
    return measure_ceilings(DEVICE, sorted(dtypes), min(0.3, budget or 0.02))


@pytest.fixture(scope="session")
def records(request: pytest.FixtureRequest, ceilings: Ceilings) -> Iterator[list[dict[str, Any]]]:
    """What was measured; appended to the results at the end."""
    found: list[dict[str, Any]] = []
    yield found
    folder = request.config.getoption("--keep") or results.home()
    if found and folder is not None:
        command = "pytest " + " ".join(map(str, request.config.invocation_params.args))
        suite = suite_of(request.config)
        first = results.run_line(describe(DEVICE), ceilings, suite=suite, command=command)
        list(results.append(folder, first, found))
