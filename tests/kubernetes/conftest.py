"""Two users' copies in the cluster of CONTEXT, side by side, each in a namespace of its own that goes again."""

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import NAME, Image, missing, write_variant
from tests.kubernetes.cluster import CONTEXT, Copy, kubectl, load_image, nodes

collect_ignore_glob = [] if CONTEXT else ["test_*.py"]  # `make check-kubernetes` names it

# What a replica can be asked to do to itself.
ROUTES = """
import os, time
@app.get("/block")
async def block() -> None:
    time.sleep(3600)
@app.get("/fill")
async def fill() -> None:
    hoard = [bytes(range(256)) * 40960 for _ in range(100)]
@app.get("/secret")
async def secret() -> str:
    with open(os.environ["DATABASE_URL_FILE"]) as file:
        return file.read()
"""


@pytest.fixture(scope="session")
def node_containers() -> list[str]:
    """The nodes, each of which is a container of the engine here."""
    for node in nodes():
        if os.system(f"docker inspect {node} >/dev/null 2>&1"):
            missing(
                f"the node {node} is no container of the engine on this machine: nothing here can kill or freeze it"
            )
    return nodes()


@pytest.fixture(scope="session")
def image(engine, node_containers) -> Image:
    return Image.build(engine)


@pytest.fixture(scope="session")
def variant(image):
    """The name of an image with more code in its main.py, which all nodes have."""

    def build(code: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            name = image.rebuilt(write_variant(Path(folder) / "main.py", code)).name
        load_image(name)
        return name

    return build


@contextmanager
def namespace(name: str) -> Generator[str]:
    name = f"{NAME}-{name}"
    kubectl("delete", "namespace", name, "--ignore-not-found")
    kubectl("create", "namespace", name)
    try:
        yield name
    finally:
        kubectl("delete", "pods", "--all", f"--namespace={name}", "--force", "--grace-period=0")
        kubectl("delete", "namespace", name)


@pytest.fixture(scope="session")
def routes(variant) -> str:
    return variant(ROUTES)


@pytest.fixture(scope="session")
def first(tmp_path_factory, routes) -> Generator[Copy]:
    """A deployment as it comes: behind an Ingress."""
    with namespace("first") as its:
        copy = Copy(tmp_path_factory.mktemp("first") / "clone", its, routes, "first", "ingress")
        copy.deploy()
        copy.settle()
        yield copy


@pytest.fixture(scope="session")
def shop(tmp_path_factory, routes) -> Generator[Copy]:
    """A second one beside it, of another name, with a secret: behind Traefik's own route, in a stricter namespace."""
    with namespace("shop") as its:
        kubectl("label", "namespace", its, "pod-security.kubernetes.io/enforce=restricted")
        copy = Copy(tmp_path_factory.mktemp("shop") / "clone", its, routes, "shop", "traefik")
        (copy.folder / "deploy/secrets/database_url").write_text("postgresql://shop")
        copy.edit("kustomization.yaml", "files: []", "files: [secrets/database_url]")
        copy.set("DATABASE_URL_FILE=/run/secrets/database_url")
        copy.deploy()
        copy.settle()
        yield copy
