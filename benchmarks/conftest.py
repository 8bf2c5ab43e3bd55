"""Shared by the suites: which cases, what machine this is, and where results go."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_model.benchmarks.measure import records as results
from fusion_model.benchmarks.measure.ceilings import Ceilings, measure_ceilings
from fusion_model.benchmarks.measure.machine import describe
from fusion_model.benchmarks.suite.bench import BUDGETS, affordable, context_of
from fusion_model.benchmarks.suite.cases import SUITES, Case, cases
from fusion_model.benchmarks.suite.run import run
from fusion_model.benchmarks.suite.work import Context
from transformers.utils import logging

Record = dict[str, Any]
logging.disable_progress_bar()
logging.set_verbosity_error()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=SUITES, help="shapes (default: quick; tiny if disabled)")
    parser.addoption("--keep", type=Path, help="folder for results (default: out/bench)")


def is_timed(config: pytest.Config) -> bool:
    disabled = config.getoption("--benchmark-disable")
    return config.getoption("--benchmark-enable") or not disabled


def suite_of(config: pytest.Config) -> str:
    chosen: str = config.getoption("--suite") or ("quick" if is_timed(config) else "tiny")
    return chosen


def chosen_cases(config: pytest.Config) -> list[Case]:
    return affordable(cases(suite_of(config)), DEVICE)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", chosen_cases(metafunc.config), ids=str)


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
    dtypes = {c.dtype for c in chosen_cases(request.config)} | {"int8"}
    return measure_ceilings(DEVICE, sorted(dtypes), min(0.3, budget or 0.02))


@pytest.fixture(scope="session")
def records(request: pytest.FixtureRequest, ceilings: Ceilings) -> Iterator[list[Record]]:
    """What was measured; appended to the results at the end."""
    found: list[Record] = []
    yield found
    folder = request.config.getoption("--keep") or results.home()
    if found and folder is not None:
        command = "pytest " + " ".join(map(str, request.config.invocation_params.args))
        suite = suite_of(request.config)
        first = results.run_line(describe(DEVICE), ceilings, suite=suite, command=command)
        list(results.append(folder, first, found))


@pytest.fixture(scope="session")
def measured(
    request: pytest.FixtureRequest,
    context: Context,
    ceilings: Ceilings,
    budget: float,
    records: list[Record],
) -> Callable[[Case], Record]:
    """The record of a case; the first that is asked for has its whole group measured."""
    chosen = chosen_cases(request.config)
    known: dict[str, dict[str, Record]] = {}

    def record(case: Case) -> Record:
        if case.group not in known:
            group = [c for c in chosen if c.group == case.group]
            found = list(run(group, context, ceilings, budget))
            known[case.group] = {r["backend"]: r for r in found}
            if is_timed(request.config):
                records.extend(found)
        return known[case.group][case.backend]

    return record
