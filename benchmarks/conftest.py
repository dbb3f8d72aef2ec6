"""Settings of `pytest benchmarks`."""

from __future__ import annotations

import os

import pytest

from benchmarks.cases import SUITES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=list(SUITES), default="quick", help="which cases `pytest benchmarks` runs")


@pytest.fixture(scope="session", autouse=True)
def pinned(request: pytest.FixtureRequest):
    """One process for all cases: pinned for the suite's most threads, unpinned afterwards."""
    from benchmarks import machine

    before = machine.cores()
    machine.pin(max(case.threads for case in SUITES[request.config.getoption("suite")].cases()))
    yield
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, before)
