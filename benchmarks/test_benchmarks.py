"""`pytest benchmarks`: the same cases and providers through pytest-benchmark, whose options all work."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install .[bench]")

from benchmarks import providers
from benchmarks.cases import SUITES, Case, left_out
from benchmarks.problem import Problem

PROVIDERS = providers.load()


@lru_cache(maxsize=1)
def problem(case: Case) -> Problem:
    return Problem(case)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = [case for case in SUITES[metafunc.config.getoption("suite")].cases() if case.how.unit == "s"]
    metafunc.parametrize("provider", PROVIDERS)
    metafunc.parametrize("case", cases, ids=str)


def test_speed(case: Case, provider: str, benchmark: Any, pytestconfig: pytest.Config) -> None:
    found = PROVIDERS[provider]
    reason = found.available() or left_out(pytestconfig.getoption("suite"), case, provider)
    if reason is not None:
        pytest.skip(f"{provider}: {reason}")
    torch.set_num_threads(case.threads)
    try:
        prepared = found.prepare(problem(case))
    except providers.Unsupported as unsupported:
        pytest.skip(f"{provider}: {unsupported}")

    def setup() -> None:
        if prepared.setup is not None:
            prepared.setup()

    setup()
    mistake = (prepared.problem or problem(case)).mistake(prepared.answer((prepared.checked or prepared.call)()))
    assert mistake is None, f"{provider} is wrong: {mistake}"
    benchmark.group = str(case)
    benchmark.extra_info.update(case.fields(), provider=provider)
    with prepared.within():
        if prepared.setup is None:
            benchmark(prepared.call)
        else:
            benchmark.pedantic(prepared.call, setup=setup, rounds=20, warmup_rounds=2)
