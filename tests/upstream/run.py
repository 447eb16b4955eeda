"""Run the own tests of FastAPI, Starlette and uvicorn with this service's parts in place, and print what came of them.

The arguments name suites: fastapi, starlette, uvicorn, and image-3.15 or image-3.14, which is FastAPI's inside the image
of that Python. IMAGE is what to name the images by, ENGINE the container engine.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from left_out import LEFT_OUT  # ty: ignore[import-not-found] — it lies beside this file

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ROOM = ROOT / ".venv" / "upstream"
IMAGE = os.environ.get("IMAGE") or "fastapi-container"
ENGINE = os.environ.get("ENGINE") or "docker"
PYTEST = ["--quiet", "--no-header", "--tb=short", "--timeout=120", "--numprocesses=2", "--dist=loadgroup"]
PYTEST += ["-p", "no:cacheprovider", "-p", "no:sugar", "-p", "left_out"]

# What of a suite to run: uvicorn's tests take its protocols in turn, and ours is in the place of the one that is left.
TESTS = {
    "fastapi": ["tests"],
    "starlette": ["tests"],
    "uvicorn": ["tests/protocols", "-k", "not h11 and not zttp and not http2"],
}

# Whatever these tests send, the service's own limit to a body is beyond it.
SETTINGS = {"MAX_BODY_BYTES": "100000000"}


def run(*command: str | Path, **options: Any) -> int:
    """Run a command and return its status."""
    return subprocess.run(command, check=False, **options).returncode


def run_here(suite: str, results: Path) -> None:
    """Run a suite on this host, with main.py's parts in place."""
    environment = os.environ | SETTINGS | {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    pytest = [ROOM / "venv/bin/python", "-m", "pytest", *PYTEST, "-p", "around", f"--suite={suite}"]
    run(*pytest, f"--junit-xml={results}", *TESTS[suite], cwd=ROOM / suite, env=environment)


def run_in_image(python: str, results: Path) -> None:
    """Run FastAPI's tests by the image's own interpreter and packages, its root read-only."""
    image = f"{IMAGE}-upstream-{python}"
    tests = f"{image}-tests"
    arguments = [f"--build-arg=PYTHON={python}", f"--build-arg=IMAGE={image}", f"--build-context=fetched={ROOM}"]
    if run("make", "--no-print-directory", "build", f"BASE_PYTHON={python}", f"IMAGE={image}", cwd=ROOT):
        sys.exit(f"{image}: the image cannot be built; the reason is above.")
    if run(ENGINE, "build", "--tag", tests, *arguments, HERE):
        sys.exit(f"{tests}: what the tests need cannot be built; the reason is above.")
    run(ENGINE, "rm", "--force", "--volumes", tests, capture_output=True)
    pytest = [*PYTEST, "--suite=image", "--junit-xml=/suite/results.xml", "tests"]
    options = ["--no-healthcheck", "--read-only", "--tmpfs=/tmp", "--volume=/suite"]
    run(ENGINE, "run", "--name", tests, *options, tests, *pytest)
    run(ENGINE, "cp", f"{tests}:/suite/results.xml", results, capture_output=True)
    run(ENGINE, "rm", "--force", "--volumes", tests, capture_output=True)
    run(ENGINE, "image", "rm", "--force", image, tests, capture_output=True)


def judge(case: ElementTree.Element, reasons: set[str]) -> str:
    """Tell what became of a test; a suite may also skip one, or expect it to fail, for a reason of its own."""
    if case.find("failure") is not None or case.find("error") is not None:
        return "failed"
    skipped = case.find("skipped")
    if skipped is None:
        return "passed"
    return "left out" if skipped.get("message") in reasons else "skipped"


def name(case: ElementTree.Element) -> str:
    """Return a test's name as in LEFT_OUT, but with dots alone: `tests.test_main.test_get`."""
    return f"{case.get('classname')}.{case.get('name', '').partition('[')[0]}"


def check(suite: str) -> tuple[Counter[str], list[str]]:
    """Run a suite, and return how many of its tests passed and so on, and what LEFT_OUT names and it does not have."""
    kind, _, python = suite.partition("-")
    results = ROOM / f"{suite}.xml"
    results.unlink(missing_ok=True)
    if python:
        run_in_image(python, results)
    else:
        run_here(suite, results)
    if not results.exists():
        sys.exit(f"{suite}: the tests did not run; the reason is above.")
    cases = list(ElementTree.parse(results).iter("testcase"))
    names = {name(case) for case in cases}
    dotted = {test: test.replace(".py::", ".").replace("::", ".").replace("/", ".") for test in LEFT_OUT[kind]}
    counts = Counter(judge(case, set(LEFT_OUT[kind].values())) for case in cases)
    return counts, [test for test in dotted if dotted[test] not in names]


def main(suites: list[str]) -> None:
    checked = {suite: check(suite) for suite in suites}
    print("suite      | passed | failed | left out | skipped by the suite itself")
    for suite, (counts, _) in checked.items():
        numbers = (counts["passed"], counts["failed"], counts["left out"], counts["skipped"])
        print("{:10} | {:6} | {:6} | {:8} | {:6}".format(suite, *numbers))
    for suite, tests in LEFT_OUT.items():
        for test, reason in tests.items():
            print(f"left out of {suite}: {test} {reason}")
    for suite, (_, missing) in checked.items():
        for test in missing:
            print(f"left out of {suite}, but no test has this name: {test}")
    sys.exit(any(counts["failed"] or not counts["passed"] or missing for counts, missing in checked.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
