"""Measure this project's image beside the container that FastAPI's guide writes, and two floors below both.

`make bench` writes results.json and figure.svg. With `FLAGS=--short` it measures less and writes nothing; with
`FLAGS=--beside=FILE` it compares one change of main.py, for which FILE has it, with main.py as it is.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import httpx

from tests.harness import HERE, PYTHONS, Container, Load, run, wait_until

BENCH = Path(__file__).parent
NAME = os.environ.get("IMAGE", "fastapi-container") + "-bench"


@dataclass(frozen=True)
class Contender:
    """What is built and measured: a directory, the file in it that its user edits, and where it says that it is ready."""

    name: str
    directory: str
    app: str
    build: tuple[str, ...] = ()
    probe: str = "/"

    @property
    def image(self) -> str:
        return f"{NAME}:{self.name.lower().replace(' ', '-')}"


def floor(name: str, app: str, packages: str) -> Contender:
    return Contender(name, "bench/floors", app, (f"--build-arg=APP={app}", f"--build-arg=PACKAGES={packages}"))


OURS = Contender("this project", ".", "main.py", probe="/readyz")
GUIDE = Contender("guide", "bench/guide", "app/main.py")
BARE = floor("bare FastAPI", "bare_fastapi.py", "fastapi uvicorn uvloop httptools")
ASGI = floor("bare ASGI", "bare_asgi.py", "uvicorn uvloop httptools")

CHANGED = Contender("changed", ".", "main.py", probe="/readyz")

ROOT, ITEM = "/", "/items/5?q=somequery"
PACKAGES = """
import importlib.metadata, pathlib
print(len({package.name for package in importlib.metadata.distributions()}))
files = (file for pattern in ("status", "status.d/*") for file in pathlib.Path("/var/lib/dpkg").glob(pattern))
print(sum(line.startswith("Package: ") for file in files for line in file.open()))
"""
LOST, COMPRESSED = "requests lost when stopped under load", "MB compressed"


@dataclass(frozen=True)
class Extent:
    """How much is measured; the loads are (path, connections), each for so many seconds."""

    rounds: int
    seconds: int
    contenders: tuple[Contender, ...]
    loads: tuple[tuple[str, int], ...]
    requests: int  # after which memory is measured once more


FULL = Extent(5, 4, (OURS, GUIDE, BARE, ASGI), ((ROOT, 1), (ROOT, 64), (ITEM, 1), (ITEM, 64)), 100_000)
SHORT = Extent(2, 2, (OURS, GUIDE, BARE), ((ITEM, 64),), 0)
SLACK = 1.4  # by which a ratio of a short run may be worse than the published one


class Goal(NamedTuple):
    """A bound of a ratio, this project's figure over another's; without another, of the worst of this project's."""

    measure: str
    other: Contender | None
    bound: float


GOALS = (
    Goal(f"requests per CPU second, {ITEM}, 64 connections", GUIDE, 1.8),
    Goal(f"ms, 99th percentile, {ITEM}, 64 connections", GUIDE, 0.5),
    Goal("MB of memory when ready", GUIDE, 0.65),
    Goal("CPU seconds to the first answer", GUIDE, 0.42),
    Goal("MB unpacked", GUIDE, 0.34),
    Goal(LOST, None, 0),
    Goal(f"requests per CPU second, {ITEM}, 64 connections", BARE, 0.88),
    Goal("MB of memory when ready", BARE, 1),
)
Figures = dict[str, dict[str, list[float]]]  # by measure and contender, one of each round


def more_is_better(measure: str) -> bool:
    return measure.startswith("requests per")


# --- Measuring ---


def build(contender: Contender, tree: Path, python: str) -> float:
    """Seconds to build the image of a contender from this copy of the repository."""
    start = time.monotonic()
    options = (f"--build-arg=PYTHON={python}", f"--build-context=project={tree}", *contender.build)
    run("docker", "build", "--quiet", "--tag", contender.image, *options, tree / contender.directory)
    return time.monotonic() - start


def measure_image(contender: Contender, extent: Extent) -> dict[str, float]:
    """Megabytes of the root that a container gets, and the packages whose records are in it."""
    container = run("docker", "create", contender.image)
    sizes = {
        measure: int(run("sh", "-c", f"docker export {container} | {form} | wc -c")) / 1e6
        for measure, form in (("MB unpacked", "cat"), (COMPRESSED, "gzip -6"))[: 2 if extent is FULL else 1]
    }
    run("docker", "rm", container)
    counts = run("docker", "run", "--rm", "--entrypoint=python", contender.image, "-c", PACKAGES).split()
    return sizes | dict(zip(("packages of Python", "packages of Debian"), map(int, counts), strict=True))


def serves(url: str) -> bool:
    with suppress(OSError), urlopen(url, timeout=5) as response:
        return response.status == 200
    return False


@contextmanager
def started(contender: Contender):
    """A container as `docker run --detach IMAGE` starts it, and its figures once it answers.

    The second of CPU time has the health checks in it that the image asks for.
    """
    start = time.monotonic()
    container = Container("docker", run("docker", "run", "--detach", contender.image))
    try:
        # Without the engine's proxy of published ports in between.
        container.url = url = f"http://{container.address}"
        pid = container.inspect("State.Pid")
        wait_until(lambda: serves(url), 60)
        yield (
            container,
            {
                "seconds to the first answer": time.monotonic() - start,
                "CPU seconds to the first answer": cpu_seconds(pid),
                "CPU seconds to the first answer, health checks included": container_cpu_seconds(container),
                "MB of memory when ready": resident_megabytes(pid),
            },
        )
    finally:
        run("docker", "rm", "--force", container.id)


def cpu_seconds(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def resident_megabytes(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1000


def container_cpu_seconds(container: Container) -> float:
    """Of all its processes so far, as the engine reads them from its cgroup, of version 1 or 2."""
    with httpx.Client(transport=httpx.HTTPTransport(uds="/var/run/docker.sock")) as engine:
        stats = engine.get(f"http://docker/containers/{container.id}/stats?stream=false&one-shot=true").json()
    return stats["cpu_stats"]["cpu_usage"]["total_usage"] / 1e9


def load(container: Container, path: str, connections: int, seconds: int) -> tuple[int, dict[str, float]]:
    """The number of requests that wrk got answered in so many seconds, and their figures."""
    limits = (f"--connections={connections}", f"--duration={seconds}")
    wrk = ("docker", "run", "--rm", "--network=host", f"{NAME}:wrk", *limits)
    before = container_cpu_seconds(container)
    report = json.loads(run(*wrk, container.url + path).splitlines()[-1])
    spent = container_cpu_seconds(container) - before
    assert report["failed"] == 0, report
    figures = {
        "requests per second": report["requests"] / report["duration"] * 1e6,
        "requests per CPU second": report["requests"] / spent,
        "ms, 50th percentile": report["p50"] / 1e3,
        "ms, 99th percentile": report["p99"] / 1e3,
    }
    suffix = f"{path}, {connections} connection{'s' * (connections > 1)}"
    return report["requests"], {f"{measure}, {suffix}": figure for measure, figure in figures.items()}


def lost(container: Container, probe: str) -> int:
    """Requests that clients lose which watch a probe and stop when it fails, while `docker stop` stops what they use."""

    async def stop(load: Load) -> None:
        await asyncio.sleep(1)  # of load
        process = await asyncio.create_subprocess_exec("docker", "stop", container.id, stdout=subprocess.DEVNULL)
        await load.watch()
        await process.wait()

    clients = Load(container.url, 32, probe)
    asyncio.run(clients.run(stop))
    assert clients.answered, clients.lost[-1:]
    return len(clients.lost)


def measure_round(contender: Contender, tree: Path, python: str, extent: Extent) -> dict[str, float]:
    """All that differs from time to time: rebuild, start, loads, stop."""
    with open(tree / contender.directory / contender.app, "a") as app:
        app.write(f"# {time.time()}\n")
    figures = {"seconds to rebuild after an edit": build(contender, tree, python)}
    with started(contender) as (container, start):
        figures |= start
        served, _ = load(container, ITEM, 64, 1)  # to warm up
        for path, connections in extent.loads:
            requests, found = load(container, path, connections, extent.seconds)
            figures |= found
            served += requests
        if extent.requests:
            while served < extent.requests:
                served += load(container, ITEM, 64, extent.seconds)[0]
            figures["MB of memory after 100,000 requests"] = resident_megabytes(container.inspect("State.Pid"))
            figures["seconds from SIGTERM to exit, idle"] = container.stop()[1]
    with started(contender) as (container, _):
        return figures | {LOST: lost(container, contender.probe)}


@contextmanager
def copied(python: str):
    """A copy of the repository, whose files may be edited, with wrk built from it."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        shutil.copytree(HERE, tree, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
        run("docker", "build", "--quiet", f"--build-arg=PYTHON={python}", "--tag", f"{NAME}:wrk", tree / "bench/wrk")
        yield tree


def compare(main: Path, python: str) -> Figures:
    """What an item costs with another main.py, beside this project's and bare FastAPI; all three run all the time."""
    figures: Figures = defaultdict(lambda: defaultdict(list))
    with copied(python) as tree, ExitStack() as stack:
        running = []
        for contender in (OURS, CHANGED, BARE):
            if contender is CHANGED:
                shutil.copy(main, tree / "main.py")
            build(contender, tree, python)
            running.append((contender, stack.enter_context(started(contender))[0]))
        for turn in range(11):
            for contender, container in running:
                for measure, figure in load(container, ITEM, 64, 1)[1].items():
                    figures[measure][contender.name] += [figure] * (turn > 0)  # the first is to warm up
    return figures


def measure(python: str, extent: Extent) -> Figures:
    """Every figure of every contender; in each round all have their turn, so that a slow minute is nobody's alone."""
    figures: Figures = defaultdict(lambda: defaultdict(list))
    begin = time.monotonic()

    def note(contender: Contender, step: str, found: dict[str, float]) -> None:
        for name, figure in found.items():
            figures[name][contender.name].append(figure)
        print(f"{time.monotonic() - begin:5.0f} s  {step}, {contender.name}", flush=True)

    with copied(python) as tree:
        for contender in extent.contenders:
            build(contender, tree, python)
            note(contender, "image", measure_image(contender, extent))
        for turn in range(1, extent.rounds + 1):
            for contender in extent.contenders:
                note(contender, f"round {turn} of {extent.rounds}", measure_round(contender, tree, python, extent))
    return figures


# --- Telling ---


def machine(python: str) -> dict[str, str | int]:
    """Where and when: what absolute figures depend on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "CPU": model[1] if model else platform.machine(),
        "cores": os.cpu_count() or 0,
        "kernel": platform.release(),
        "Docker": run("docker", "version", "--format", "{{.Server.Version}}"),
        "cgroup": run("docker", "info", "--format", "{{.CgroupVersion}}"),
        "Python": python,
        "date": datetime.now(UTC).date().isoformat(),
        "revision": run("git", "describe", "--always", "--dirty", cwd=HERE),
    }


def ratio(figures: Figures, measure: str, other: Contender) -> float | None:
    """This project's median over another's; None where that is nothing."""
    ours, theirs = (statistics.median(figures[measure][one.name]) for one in (OURS, other))
    return ours / theirs if theirs else None


def number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 or figure == int(figure) else f"{figure:.3g}"


def print_table(figures: Figures) -> None:
    """This project's ratios; then all medians, and half of what lies between the least and the greatest figure."""
    contenders = list(next(iter(figures.values())))
    others = [other for other in (CHANGED, GUIDE, BARE) if other.name in contenders]
    print(f"\n{'':58}", *(f"/{other.name:>13}" for other in others), *(f"{name:>18}" for name in contenders))
    for measure, found in figures.items():
        print(f"{measure:58}", end="")
        for other in others:
            share = ratio(figures, measure, other)
            print(f"{'-' if share is None else f'{share:.2f}':>15}", end="")
        for values in found.values():
            middle, spread = statistics.median(values), (max(values) - min(values)) / 2
            print(f"{number(middle) + (f' ± {spread / middle:.0%}' if spread and middle else ''):>19}", end="")
        print()


def missed(figures: Figures, published: Figures | None) -> list[str]:
    """A sentence on each goal that is not reached; of a short run, on each ratio far from what has been published."""
    sentences = []
    for goal in GOALS:
        more = more_is_better(goal.measure)
        found, bound = max(figures[goal.measure][OURS.name]), goal.bound
        if goal.other:
            found = ratio(figures, goal.measure, goal.other) or 0
            if published:
                before = ratio(published, goal.measure, goal.other) or 0
                bound = before / SLACK if more else before * SLACK
        if published and goal.measure.startswith("ms"):
            continue  # a 99th percentile of two seconds is an accident
        if found < bound if more else found > bound:
            other = f" of {goal.other.name}'s" if goal.other else ""
            sentences.append(f"{goal.measure}: {found:.2f}{other}, not {'>=' if more else '<='} {bound:.3g}")
    return sentences


def draw(results: dict) -> str:
    """An SVG of each goal against the guide, less being better, in greys that show on white and on black."""
    figures, at = results["figures"], results["machine"]
    rows = []
    for measure in dict.fromkeys([goal.measure for goal in GOALS if goal.other is GUIDE] + [COMPRESSED]):
        ours, guide, bare = (statistics.median(figures[measure][one.name]) for one in (OURS, GUIDE, BARE))
        name = measure.replace(f", {ITEM}", "")
        if more_is_better(measure):
            name = name.replace("requests per CPU second", "µs of CPU a request")
            ours, guide, bare = (1e6 / figure for figure in (ours, guide, bare))
        rows.append(f"""<g transform="translate(290 {60 + 34 * len(rows)})">
<text x="-12" y="14" text-anchor="end">{name}</text>
<rect width="300" height="18" rx="3" opacity=".3"/>
<rect width="{300 * min(ours / guide, 1):.0f}" height="18" rx="3" fill="#3b82f6"/>
<path d="M{300 * min(bare / guide, 1):.0f} -4v26" stroke="#747c86" stroke-width="3"/>
<text x="312" y="14"><tspan font-weight="bold">{ours / guide:.0%}</tspan>&#160; {number(ours)} : {number(guide)}</text>
</g>
""")
    end = 60 + 34 * len(rows)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{end + 24}" fill="#747c86" font-size="13" \
font-family="system-ui, sans-serif">
<text x="290" y="22" font-weight="bold">This project, in per cent of the container of FastAPI's guide</text>
<text x="290" y="42">less is better; the line is bare FastAPI, without a log</text>
{"".join(rows)}<text x="290" y="{end + 12}" font-size="11">{at["CPU"]}, Python {at["Python"]}, {at["date"]}</text>
</svg>
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="check against what is published, and write nothing")
    parser.add_argument("--beside", type=Path, metavar="FILE", help="compare what a request costs with this main.py")
    parser.add_argument("--python", default=PYTHONS[0], choices=PYTHONS, help="of all images")
    arguments = parser.parse_args()
    if arguments.beside and not arguments.beside.is_file():
        parser.error(f"--beside={arguments.beside}: there is no such file")
    if arguments.beside:
        return print_table(compare(arguments.beside, arguments.python))
    extent = SHORT if arguments.short else FULL
    figures = measure(arguments.python, extent)
    print_table(figures)
    if arguments.python != PYTHONS[0]:
        return  # what is published and promised is of the image as it ships
    if extent is FULL:
        results = {"machine": machine(arguments.python), "figures": figures}
        (BENCH / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        (BENCH / "figure.svg").write_text(draw(results))
    published = json.loads((BENCH / "results.json").read_text())["figures"] if extent is SHORT else None
    sys.exit("\n".join(missed(figures, published)) or 0)


if __name__ == "__main__":
    main()
