"""Run the own tests of FastAPI, Starlette and uvicorn with this service's parts in place, and print what came of them.

The arguments name suites: fastapi, starlette, uvicorn, and image-3.15 or image-3.14, which is FastAPI's inside the image
of that Python. IMAGE is what to name the images by, ENGINE the container engine.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from left_out import LEFT_OUT

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


def run_here(suite: str, results: Path) -> int:
    """Run a suite on this host with main.py's parts, and return pytest's status."""
    pytest = [ROOM / "venv/bin/python", "-m", "pytest", *PYTEST, "-p", "around"]
    environment = os.environ | SETTINGS | {"PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"}
    arguments = [f"--suite={suite}", f"--junit-xml={results}", *TESTS[suite]]
    return subprocess.run([*pytest, *arguments], cwd=ROOM / suite, env=environment).returncode


def run_in_image(python: str, results: Path) -> int:
    """Run FastAPI's tests by the image's own interpreter, its root read-only, and return pytest's status."""
    image = f"{IMAGE}-upstream-{python}"
    tests = f"{image}-tests"
    subprocess.run(["make", "--no-print-directory", "build", f"PYTHON={python}", f"IMAGE={image}"], cwd=ROOT, check=True)
    build = [ENGINE, "build", "--quiet", "--tag", tests, "--build-context", f"fetched={ROOM}"]
    subprocess.run([*build, "--build-arg", f"PYTHON={python}", "--build-arg", f"IMAGE={image}", HERE], check=True)
    remove = [ENGINE, "rm", "--force", "--volumes", tests]
    subprocess.run(remove, capture_output=True)
    run = [ENGINE, "run", "--name", tests, "--read-only", "--tmpfs", "/tmp", "--volume", "/suite", tests]
    status = subprocess.run([*run, *PYTEST, "--suite=image", "--junit-xml=/suite/results.xml", "tests"]).returncode
    subprocess.run([ENGINE, "cp", f"{tests}:/suite/results.xml", results], capture_output=True)
    subprocess.run(remove, capture_output=True)
    subprocess.run([ENGINE, "image", "rm", "--force", image, tests], capture_output=True)
    return status


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


def check(suite: str) -> tuple[Counter[str], bool]:
    """Run a suite, and return how many of its tests passed and so on, and whether all of it is as expected."""
    kind, _, python = suite.partition("-")
    results = ROOM / f"{suite}.xml"
    results.unlink(missing_ok=True)
    status = run_in_image(python, results) if python else run_here(suite, results)
    if not results.exists():
        sys.exit(f"{suite}: the tests did not run; the reason is above.")
    cases = list(ElementTree.parse(results).iter("testcase"))
    names = {name(case) for case in cases}
    left_out = {test: test.replace(".py::", ".").replace("::", ".").replace("/", ".") for test in LEFT_OUT[kind]}
    missing = [test for test, dotted in left_out.items() if dotted not in names]
    for test in missing:
        print(f"{suite}: no test has the name {test}, which is to be left out.")
    return Counter(judge(case, set(LEFT_OUT[kind].values())) for case in cases), status == 0 and not missing


def main(suites: list[str]) -> None:
    checked = {suite: check(suite) for suite in suites}
    print("suite      | passed | failed | left out | skipped by the suite itself")
    for suite, (counts, _) in checked.items():
        numbers = (counts["passed"], counts["failed"], counts["left out"], counts["skipped"])
        print("{:10} | {:6} | {:6} | {:8} | {:6}".format(suite, *numbers))
    for suite, tests in LEFT_OUT.items():
        for test, reason in tests.items():
            print(f"left out of {suite}: {test} {reason}")
    sys.exit(not all(is_fine for _, is_fine in checked.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
