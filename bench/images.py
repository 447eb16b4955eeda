"""A copy of the repository, and the images that are built from it."""

import json
import shutil
import subprocess
import tempfile
import time
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.contenders import COMPRESSED, NAME, WAITING, Contender
from tests.harness import CONTAINER, HERE, run

Found = dict[str, Any]  # by measure: a number, a truth, a version
WRK = f"{NAME}:wrk"
VERSIONS = ("fastapi", "starlette", "pydantic", "uvicorn", "granian")
LOOK = f"""
import importlib.metadata, json, pathlib
python = {{package.name.lower(): package.version for package in importlib.metadata.distributions()}}
files = (file for pattern in ("status", "status.d/*") for file in pathlib.Path("/var/lib/dpkg").glob(pattern))
debian = sum(line.startswith("Package: ") for file in files for line in file.open())
print(json.dumps({{"packages of Python": len(python), "packages of Debian": debian}}
    | {{f"version of {{name}}": python[name] for name in {VERSIONS} if name in python}}))
"""


@contextmanager
def copied():
    """A copy of the repository, whose files may be edited."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        shutil.copytree(HERE, tree, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
        yield tree


def add_waiting(app: Path) -> None:
    """Add the operation that waits: to main.py at the end of its first part, to other apps of FastAPI at their end."""
    service, heading, rest = app.read_text().partition(CONTAINER)
    if "FastAPI" in service:
        app.write_text(service + WAITING + heading + rest)


def build(contender: Contender, tree: Path, python: str) -> float:
    """Seconds to build the image of a contender from this copy of the repository."""
    start = time.monotonic()
    contexts = (f"--build-context=project={tree}", f"--build-context=guide={tree / 'bench/guide'}")
    options = (f"--build-arg=PYTHON={python}", *contexts, *contender.build)
    run("docker", "build", "--quiet", "--tag", contender.image, *options, tree / contender.directory)
    return time.monotonic() - start


def break_build(contender: Contender, tree: Path) -> None:
    """Make the build of a contender fail, to see what becomes of a run."""
    with open(tree / contender.directory / "Dockerfile", "a") as dockerfile:
        dockerfile.write("\nRUN false\n")


def build_wrk(tree: Path, python: str) -> Found:
    run("docker", "build", "--quiet", f"--build-arg=PYTHON={python}", "--tag", WRK, tree / "bench/wrk")
    return {}


def image(contender: Contender, tree: Path, python: str) -> Found:
    build(contender, tree, python)
    return measure_image(contender)


def rebuild(contender: Contender, tree: Path, python: str) -> Found:
    with open(tree / contender.app, "a") as app:
        app.write(f"# {time.time()}\n")
    return {"seconds to rebuild after an edit": build(contender, tree, python)}


def measure_image(contender: Contender) -> Found:
    """Megabytes of the root that a container gets, and the packages whose records are in it."""
    container = run("docker", "create", contender.image)
    unpacked, compressed = sizes(("docker", "export", container))
    run("docker", "rm", "--volumes", container)
    found = json.loads(run("docker", "run", "--rm", "--entrypoint=python", contender.image, "-c", LOOK))
    return {"MB unpacked": unpacked / 1e6, COMPRESSED: compressed / 1e6} | found


def sizes(command: tuple[str, ...]) -> tuple[int, int]:
    """Bytes of what a command prints, and of the same through gzip at its usual level."""
    unpacked, compressed, gzip = 0, 0, zlib.compressobj(6, wbits=31)
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while piece := process.stdout.read(1 << 20) if process.stdout else b"":
            unpacked += len(piece)
            compressed += len(gzip.compress(piece))
    assert process.returncode == 0, command
    return unpacked, compressed + len(gzip.flush())
