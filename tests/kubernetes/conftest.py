"""Two users' copies in the cluster of CONTEXT, side by side, each in a namespace of its own that goes again."""

import os
import tempfile
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
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
        kubectl("delete", "namespace", name, "--wait=false")  # the next run waits for its end


@pytest.fixture(scope="session")
def routes(variant) -> str:
    return variant(ROUTES)


@pytest.fixture(scope="session")
def copies(tmp_path_factory, routes) -> Generator[tuple[Copy, Copy]]:
    """Both, deployed side by side at once."""
    with namespace("first") as one, namespace("shop") as other:
        kubectl("label", "namespace", other, "pod-security.kubernetes.io/enforce=restricted")
        first = Copy(tmp_path_factory.mktemp("first") / "clone", one, routes, "first", "ingress")
        shop = Copy(tmp_path_factory.mktemp("shop") / "clone", other, routes, "shop", "traefik")
        (shop.folder / "deploy/secrets/database_url").write_text("postgresql://shop")
        shop.edit("kustomization.yaml", "files: []", "files: [secrets/database_url]")
        shop.set("DATABASE_URL_FILE=/run/secrets/database_url")
        with ThreadPoolExecutor() as pool:
            list(pool.map(Copy.deploy, (first, shop)))
        first.settle()
        shop.settle()
        yield first, shop


@pytest.fixture(scope="session")
def first(copies) -> Copy:
    """A deployment as it comes: behind an Ingress."""
    return copies[0]


@pytest.fixture(scope="session")
def shop(copies) -> Copy:
    """A second one beside it, of another name, with a secret: behind Traefik's own route, in a stricter namespace."""
    return copies[1]
