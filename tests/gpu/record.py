"""A pytest plugin that writes a line of JSON after each test: ``pytest -p tests.gpu.record --record FILE``.

A line has the test, its outcome, its seconds, and the largest error of each result that was compared beside what is
allowed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.calls import OBSERVERS

ERRORS = "errors"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option."""
    parser.addoption("--record", type=Path, default=None, help="file for a line of JSON after each test")


def pytest_configure(config: pytest.Config) -> None:
    """Writes in the process that gathers the results, if several run tests."""
    path = config.getoption("--record")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(path))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Keeps the largest error of each result that the test compares."""
    errors: dict[str, dict[str, float]] = {}

    def observe(name: str, error: float, allowed: float) -> None:
        if name not in errors or error / max(allowed, 1e-30) > errors[name]["share"]:
            errors[name] = {"error": error, "allowed": allowed, "share": error / max(allowed, 1e-30)}

    OBSERVERS.append(observe)
    try:
        yield
    finally:
        OBSERVERS.remove(observe)
        item.user_properties.append((ERRORS, errors))


class Writer:
    """Appends to a file, which it makes anew."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Writes the outcome of a test, or of what is before and after it where that fails."""
        if report.when != "call" and report.passed:
            return
        line: dict[str, Any] = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            ERRORS: dict(report.user_properties).get(ERRORS, {}),
        }
        if not report.passed:
            line["why"] = report.longreprtext[-2000:] if report.failed else str(report.longrepr)[-300:]
        with self.path.open("a", encoding="utf-8") as file:
            print(json.dumps(line), file=file, flush=True)
