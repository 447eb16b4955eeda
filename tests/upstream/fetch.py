"""Fetch the own tests of FastAPI, Starlette and uvicorn, at the lock's versions, and install what these tests need.

All of it goes into .venv/upstream: the suites, each in a folder of its name, without the package itself; venv, where
they run on this host; and tools.txt, the list of what they need, from which the image's Python gets them, too.
"""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).parents[2]
ROOM = ROOT / ".venv" / "upstream"
LOCK = ROOT / "requirements.txt"
GROUPS = {"fastapi": "tests", "starlette": "dev", "uvicorn": "dev"}  # the dependency groups of their pyproject.toml
OPTIONAL = "fastapi[all]\norjson\nujson\n"  # beside the groups, or tests of FastAPI skip themselves


def uv(*arguments: str | Path, given: str = "") -> None:
    """Run uv in its quiet way, with `given` as its input; exit with what it says where it fails."""
    command = [ROOT / ".venv/bin/uv", "--quiet", *arguments]
    done = subprocess.run(command, check=False, input=given, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"Cannot fetch what the tests need: {' '.join(done.stderr.split())}")


def read_locked() -> list[dict[str, Any]]:
    """Return the lock's packages, with the addresses of their files and when each was published."""
    file = ROOM / "pylock.toml"
    uv("pip", "compile", "--no-deps", "--universal", "--format", "pylock.toml", "--output-file", file, LOCK)
    return tomllib.loads(file.read_text())["packages"]


def unpack(package: dict[str, Any]) -> None:
    """Unpack a source distribution, the package itself left out: the tests import the one that is installed."""
    try:
        with urlopen(package["sdist"]["url"]) as response:
            data = response.read()
    except OSError as error:
        sys.exit(f"Cannot fetch the source distribution of {package['name']}: {error}")
    if hashlib.sha256(data).hexdigest() not in LOCK.read_text():
        sys.exit(f"The source distribution of {package['name']} has none of the hashes in requirements.txt.")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # which Python 3.11.3 does not have yet
        for member in archive:
            member.name = member.name.partition("/")[2]
            if not member.name.startswith(package["name"] + "/"):
                archive.extract(member, ROOM / package["name"])


def write_tools(published: str) -> None:
    """Pin what the suites need, as of when the newest package of the lock was published: so it changes with the lock."""
    groups = [f"--group={ROOM / name / 'pyproject.toml'}:{group}" for name, group in GROUPS.items()]
    options = ["--universal", "--python-version=3.11", "--generate-hashes", f"--exclude-newer={published}"]
    tools = ["--constraint", LOCK, "--output-file", ROOM / "tools.txt"]
    uv("pip", "compile", *options, *groups, *tools, "-", given=OPTIONAL)


if __name__ == "__main__":
    shutil.rmtree(ROOM, ignore_errors=True)
    ROOM.mkdir(parents=True)
    shutil.copy(LOCK, ROOM)
    packages = read_locked()
    for package in packages:
        if package["name"] in GROUPS:
            unpack(package)
    files = [file for package in packages for file in [*package.get("wheels", []), package.get("sdist", {})] if file]
    write_tools(max(file["upload-time"] for file in files).isoformat())
    uv("venv", ROOM / "venv")
    uv("pip", "install", "--python", ROOM / "venv", "--requirements", LOCK, "--requirements", ROOM / "tools.txt")
