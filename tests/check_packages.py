"""Packages that services often use, built into the image in the way of the five files, imported and used a little."""

import json
import os
import re
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.harness import HERE, NAME, PYTHONS, copy_five, make, run
from tests.packages import TRIED

TABLE = HERE / "docs/packages.md"
# What has no wheel for a Python, as of 2026-11: the image has no compiler.
NO_WHEEL = {"3.14": set[str](), "3.15": {"aiokafka", "scikit-image", "zstandard"}}
STRICT = ("--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none")


def tried_on(python: str) -> list[str]:
    return [requirement for requirement in TRIED if requirement not in NO_WHEEL[python]]


@pytest.fixture(scope="module")
def outcome(engine, tmp_path_factory) -> dict[str, Any]:
    """For each Python: what failed, and the size and the requirements of each distribution."""
    outcome: dict[str, Any] = {}
    for python in PYTHONS:
        folder = copy_five(tmp_path_factory.mktemp("packages"))
        wanted = tried_on(python)
        main = folder / "main.py"
        more = "".join(f'"{requirement}", ' for requirement in wanted)
        main.write_text(main.read_text().replace("# dependencies = [", f"# dependencies = [{more}", 1))
        name = f"{NAME}-packages:{python}"
        status, output = make(
            "lock", "build", f"ENGINE={engine}", f"BASE_PYTHON={python}", f"IMAGE={name}", folder=folder
        )
        assert status == 0, output[-4000:]
        flags = (*STRICT, "--rm", f"--volume={HERE}/tests/packages.py:/app/packages.py:ro", "--entrypoint=python")
        outcome[python] = json.loads(run(engine, "run", *flags, name, "packages.py", *wanted).splitlines()[-1])
        outcome[python]["paths"] = run(engine, "run", *flags, name, "-c", "import os; print(os.path.exists('/image'))")
    return outcome


def megabytes(requirement: str, installed: dict[str, Any], base: set[str]) -> float:
    """What a package and all that it needs add to the packages of the lock."""
    sizes = {canonicalize_name(name): distribution for name, distribution in installed.items()}
    found, waiting = set(), [Requirement(requirement)]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if (name, *wanted.extras) in found or name not in sizes:
            continue
        found.add((name, *wanted.extras))
        for text in sizes[name]["requires"]:
            needed = Requirement(text)
            extras = wanted.extras or {""}
            if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(needed)
    return sum(sizes[name]["bytes"] for name in {key[0] for key in found} - base) / 1e6


def table(outcome: dict[str, Any]) -> str:
    """docs/packages.md, as this run found it."""
    base: set[str] = {
        canonicalize_name(name)
        for name in re.findall(r"^([\w.-]+)==", (HERE / "requirements.txt").read_text(), re.MULTILINE)
    }
    pythons = sorted(PYTHONS)
    rows = []
    for requirement, function in TRIED.items():
        on = [python for python in pythons if requirement not in NO_WHEEL[python]]
        added = megabytes(requirement, outcome[on[-1]]["installed"], base)
        works = ("yes" if python in on else "no wheel" for python in pythons)
        rows.append(f"| {requirement} | {function.__doc__} | {added:.1f} | {' | '.join(works)} |")
    head = f"| package | what was tried | MB | {' | '.join(pythons)} |\n| --- | --- | --- | {' | '.join('---' for _ in pythons)} |"
    return f"{head}\n" + "\n".join(rows) + "\n"


def cells(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


@pytest.mark.check
@pytest.mark.parametrize("python", PYTHONS)
def test_packages_work_in_the_strict_image(outcome, python):
    assert outcome[python]["failed"] == {}


@pytest.mark.check
@pytest.mark.parametrize("python", PYTHONS)
def test_no_file_lands_twice(outcome, python):
    assert outcome[python]["paths"] == "False"


@pytest.mark.check
def test_table_says_what_was_found(outcome):
    """Sizes may differ by a quarter, as newer versions do; WRITE=1 writes the table anew."""
    text = TABLE.read_text()
    found = table(outcome)
    if os.environ.get("WRITE"):
        TABLE.write_text(text.partition("| package |")[0] + found)
        return
    for said, now in zip(cells(text)[2:], cells(found)[2:], strict=True):
        assert said[:2] + said[3:] == now[:2] + now[3:]
        assert abs(float(said[2]) - float(now[2])) <= max(1, float(now[2]) / 4), (said, now)
