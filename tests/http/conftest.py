"""The services that these tests share, each with deadlines of its own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import UV, Process, write_variant
from tests.http.wire import PATIENT, SERVICE


def serve(source: Path, *arguments: str, **options) -> Iterator[Process]:
    """The service with these deadlines and no others; nothing that a client does is an error in its log."""
    with Process(*arguments, source=source, **options) as process:
        yield process
        process.mark()
        ours = [line for line in process.lines if line.get("exception.type") != "Intended"]
        assert [line for line in ours if line.get("level", "error") in {"error", "critical"}] == []


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    return write_variant(tmp_path_factory.mktemp("http") / "main.py", SERVICE)


@pytest.fixture(scope="session")
def patient(source):
    yield from serve(source, **PATIENT)


@pytest.fixture(scope="session")
def short_idle(source):
    yield from serve(source, **PATIENT | {"TIMEOUT_KEEP_ALIVE": "1"})


@pytest.fixture(scope="session")
def short_head(source):
    yield from serve(source, **PATIENT | {"CLIENT_HEADER_TIMEOUT": "1"})


@pytest.fixture(scope="session")
def short_body(source):
    yield from serve(source, **PATIENT | {"CLIENT_BODY_TIMEOUT": "1"}, MAX_BODY_BYTES="10000000")


@pytest.fixture(scope="session")
def sockets(source):
    """With a package for WebSockets, which the service itself does not have."""
    layered = (UV, "run", "--quiet", "--no-project", "--python", sys.executable, "--with", "websockets==17.4", "python")
    yield from serve(source, command=layered, **PATIENT)
