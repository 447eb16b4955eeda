"""The fixtures that several files of tests take."""

import os
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path

import httpx
import pytest

from tests.harness import NAME, PYTHONS, Image, Process, engine_answers, frozen, missing, run, write_variant


def pytest_configure(config) -> None:
    # Each `httpx.get` reads the certificates of every authority again, which takes 20 ms of CPU: here it is done once.
    pytest.MonkeyPatch().setattr("httpx._transports.default.create_ssl_context", cache(httpx.create_ssl_context))
    config.addinivalue_line("markers", "check: of `make check` alone, since it needs an engine or minutes")
    config.addinivalue_line("markers", "contract: runs test_main.py, so it fails where that does")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """What needs an engine is not of `make test`."""
    for item in items:
        if "engine" in item.fixturenames:
            item.add_marker("check")


def pytest_sessionfinish(session) -> None:
    """Leave the swarm that test_stack.py began, once the tests of all processes are over.

    The engine forgets the names of all containers when it leaves, so that no other test could find one by its name.
    """
    if hasattr(session.config, "workerinput") or not shutil.which("docker"):
        return
    ask = ("docker", "node", "inspect", "self", "--format={{.Spec.Labels.tests}}")
    if subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() == NAME:
        run("docker", "swarm", "leave", "--force")


@pytest.fixture
def variant(tmp_path):
    """Writes somebody's own main.py: the service of the tests with more code in it."""

    def write(code: str = "") -> Path:
        return write_variant(tmp_path / "main.py", code)

    return write


@pytest.fixture(scope="session")
def service():
    """`python main.py` with the service of the tests, which they share: each looks at what it caused itself."""
    with Process(HOTEL_API_URL="http://hotel") as process:  # a variable that is of nobody here
        yield process


@pytest.fixture(scope="session")
def engine() -> str:
    """The engine that ENGINE insists on, or the first that answers."""
    insisted = os.environ.get("ENGINE")
    for name in [insisted] if insisted else ["docker", "podman"]:
        if engine_answers(name):
            return name
    if insisted:
        pytest.fail(f"no container engine answers as {insisted}: start it")
    return missing("no container engine answers: start Docker or Podman")


@pytest.fixture(scope="session")
def image(request, engine) -> Image:
    """The image on the Dockerfile's own Python, or on the one that `each_python` asks for."""
    return Image.build(engine, getattr(request, "param", PYTHONS[0]))


@pytest.fixture(scope="session")
def deployed(engine) -> str:
    """The name of the image that a stack of deploy/compose.yaml runs, with the service of the tests in it."""
    if engine != "docker":
        missing("Traefik reads Docker's socket")
    return Image.build(engine).rebuilt(frozen()).name


@pytest.fixture(scope="session")
def files(image, tmp_path_factory) -> dict[str, tarfile.TarInfo]:
    """Every file of the image, by its path, and the figures of its archive."""
    archive = tmp_path_factory.mktemp("image") / "root.tar"
    container = run(image.engine, "create", image.name)
    run(image.engine, "export", "--output", archive, container)
    run(image.engine, "rm", container)
    image.archive = archive
    engines = {".dockerenv", "dev", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf", "proc", "run", "sys"}
    with tarfile.open(archive) as root:
        return {f"/{m.name}": m for m in root if not {m.name, m.name.split("/")[0]} & engines}
