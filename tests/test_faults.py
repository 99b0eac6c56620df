"""Runs that are broken on purpose, through the real launcher; the whole table: make faults."""

from pathlib import Path

import pytest

from tests.faults import Case, Laboratory, cases


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    return Laboratory(Path(tmp_path_factory.mktemp("faults")))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=() if case.short else pytest.mark.slow) for case in cases()]
)
def test_run_survives(laboratory: Laboratory, case: Case) -> None:
    assert case.act(laboratory) == case.expected
