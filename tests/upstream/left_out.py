"""A pytest plugin: the tests that are left out of the suites, each with its reason. They run, and must fail.

A name stands for all parameters of its test. run.py tells of a name that no test has.
"""

import os

import pytest

NO_GIT = "runs git, which the image does not have"
ROOT = "takes a right away from the user who runs it, who is root and needs none"

LEFT_OUT = {
    "fastapi": {},
    "starlette": {},
    "uvicorn": {},
    "image": {"tests/test_translate.py::test_commit_translation_changes": NO_GIT},
}
if os.geteuid() == 0:
    LEFT_OUT["starlette"]["tests/test_staticfiles.py::test_staticfiles_with_invalid_dir_permissions_returns_401"] = ROOT


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=LEFT_OUT, help="whose list of tests that are left out applies")


@pytest.hookimpl(tryfirst=True)  # before xdist adds the group of a test to its name
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = LEFT_OUT[config.getoption("suite")]
    for item in items:
        if reason := reasons.get(item.nodeid.partition("[")[0]):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
