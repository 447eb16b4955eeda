"""A pytest plugin: the tests that are left out of the suites, each with its reason. They run, and must fail.

A name stands for all parameters of its test; run.py tells of a name that no test has. What the suites give a process of
their own to end in is for a quiet machine: here it is ten times as much.
"""

import functools
import os
import subprocess
from typing import Any

import pytest

NO_GIT = "runs git, which the image does not have"
ROOT = "takes a right away from the user who runs it, who is root here and has it without"

LEFT_OUT: dict[str, dict[str, str]] = {
    "fastapi": {},
    "starlette": {},
    "uvicorn": {},
    "image": {"tests/test_translate.py::test_commit_translation_changes": NO_GIT},
}
if os.geteuid() == 0:
    LEFT_OUT["starlette"]["tests/test_staticfiles.py::test_staticfiles_with_invalid_dir_permissions_returns_401"] = ROOT


def wait_longer(run: Any) -> Any:
    """Return `subprocess.run` with ten times the timeout that it is given."""

    @functools.wraps(run)
    def run_longer(*arguments: Any, timeout: float | None = None, **options: Any) -> Any:
        return run(*arguments, timeout=timeout and 10 * timeout, **options)

    return run_longer


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=LEFT_OUT, help="whose list of tests that are left out applies")


def pytest_configure() -> None:
    subprocess.run = wait_longer(subprocess.run)


@pytest.hookimpl(tryfirst=True)  # before xdist adds the group of a test to its name
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = LEFT_OUT[config.getoption("suite")]
    for item in items:
        if reason := reasons.get(item.nodeid.partition("[")[0]):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
