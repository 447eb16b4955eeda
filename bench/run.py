"""Measure this project's image beside what a user would pick instead, and two floors below all.

`make bench` writes results.json, figure.svg and the tables of the README. With `FLAGS=--short` it measures less and
writes nothing; with `FLAGS=--beside=FILE` it compares one change of main.py, for which FILE has it, with main.py as it is.
"""

import argparse
import json
import os
import platform
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import costs, images, steps
from bench.contenders import (
    BARE,
    BENCH,
    CHANGED,
    CONTENDERS,
    FULL,
    ITEM,
    LIMIT,
    LOGGING,
    MEMORY,
    OURS,
    REQUESTS,
    SHORT,
    SILENT,
    Contender,
    Extent,
)
from bench.figures import Figures, draw, missed, print_table, rewrite
from tests.harness import HERE, PYTHONS, run


class Run:
    """What is found, and what is left out: a step that fails is tried once more, and then costs what it would have found."""

    def __init__(self, extent: Extent, python: str, failing: str = "") -> None:
        self.extent, self.python, self.failing = extent, python, failing
        self.figures: Figures = defaultdict(lambda: defaultdict(list))
        self.left_out: list[str] = []
        self.begin = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def say(self, text: str) -> None:
        print(f"{self.seconds:4.0f} of about {self.extent.expected()} s  {text}", flush=True)

    def attempt(self, name: str, who: str, step: Callable[..., images.Found], *arguments: Any) -> bool:
        """Take a step and note what it found of whom; whether it succeeded, the second time at the latest."""
        for again in (True, False):
            try:
                found = step(*arguments)
            except Exception as error:  # noqa: BLE001, since whatever it is, the others' figures are worth having
                why = (str(error).strip() or repr(error)).splitlines()[-1]
                self.say(f"{name}, {who}: failed{', trying again' if again else ' again'}: {why[-300:]}")
            else:
                for measure, figure in found.items():
                    self.figures[measure][who].append(figure)
                self.say(f"{name}, {who}")
                return True
        self.left_out.append(f"{name}, {who}")
        return False

    def measure(self, save: Callable[[], None]) -> None:
        """Every figure of every contender; in each round all have their turn, so that a slow minute is nobody's alone."""
        with images.copied() as tree:
            contenders = self.build(tree)
            with steps.Wrk() as wrk:
                for one in contenders:
                    self.attempt("stop", one.name, steps.observe, one)
                self.measure_costs(contenders, wrk)
                self.measure_rounds(contenders, tree, wrk, save)
        save()

    def build(self, tree: Path) -> list[Contender]:
        """Build all images, two at a time, and look at them; the contenders whose image is there."""
        for app in {contender.app for contender in self.extent.contenders}:
            images.add_waiting(tree / app)
        for contender in self.extent.contenders:
            if contender.tag == self.failing:
                images.break_build(contender, tree)
        own = [contender for contender in self.extent.contenders if not contender.command]
        with ThreadPoolExecutor(2) as threads:
            threads.submit(self.attempt, "image", "wrk", images.build_wrk, tree, self.python)
            futures = {
                one.tag: threads.submit(self.attempt, "image", one.name, images.image, one, tree, self.python)
                for one in own
            }
        there = [contender for contender in self.extent.contenders if futures[contender.tag].result()]
        self.left_out += [f"all of {contender.name}" for contender in self.extent.contenders if contender not in there]
        return there

    def measure_costs(self, contenders: list[Contender], wrk: steps.Wrk) -> None:
        """What is measured once: of this project, and of uvicorn's own log, which bare FastAPI gets for it."""
        if not self.extent.costs:
            self.left_out.append("first answer, access log and little memory, which a short run does not measure")
            return
        if OURS in contenders:
            self.attempt("first answer", OURS.name, costs.first_answer, OURS)
            self.attempt("access log", OURS.name, costs.record, OURS, SILENT, wrk)
            self.attempt(f"{REQUESTS:,} requests in {MEMORY} MB", OURS.name, costs.little_memory, OURS, wrk)
        if BARE in contenders:
            self.attempt("access log", BARE.name, costs.record, LOGGING, BARE, wrk)

    def measure_rounds(self, contenders: list[Contender], tree: Path, wrk: steps.Wrk, save: Callable[[], None]) -> None:
        """As many rounds as there is time for; `save` follows each."""
        longest = 0.0
        for turn in range(1, self.extent.rounds + 1):
            start, name = self.seconds, f"round {turn} of {self.extent.rounds}"
            if start + longest > LIMIT:
                self.left_out.append(f"{name}, and what follows: it would end after {LIMIT} s")
                return
            for one in contenders:
                if not one.command:
                    self.attempt(f"{name}, rebuild", one.name, images.rebuild, one, tree, self.python)
                self.attempt(name, one.name, steps.measure_round, one, wrk, self.extent)
                if one in self.extent.proxied:
                    self.attempt(f"{name}, behind the proxy", one.name, steps.behind_proxy, one, wrk, self.extent)
            longest = max(longest, self.seconds - start)
            save()


def compare(main: Path, python: str) -> Figures:
    """What an item costs with another main.py, beside this project's and bare FastAPI; all three run all the time."""
    figures: Figures = defaultdict(lambda: defaultdict(list))
    with images.copied() as tree, ExitStack() as stack:
        images.build_wrk(tree, python)
        wrk = stack.enter_context(steps.Wrk())
        running = []
        for contender in (OURS, CHANGED, BARE):
            if contender is CHANGED:
                shutil.copy(main, tree / "main.py")
            images.build(contender, tree, python)
            running.append((contender, stack.enter_context(steps.started(contender))[0]))
        for turn in range(11):
            for contender, container in running:
                for measure, figure in wrk.load(container, ITEM, 64, 1).items():
                    figures[measure][contender.name] += [figure] * (turn > 0)  # the first is to warm up
    return figures


def machine(python: str) -> dict[str, Any]:
    """Where and when: what absolute figures depend on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "CPU": model[1] if model else platform.machine(),
        "cores": os.cpu_count() or 0,
        "kernel": platform.release(),
        "load": round(os.getloadavg()[0], 2),
        "Docker": run("docker", "version", "--format", "{{.Server.Version}}"),
        "cgroup": run("docker", "info", "--format", "{{.CgroupVersion}}"),
        "proxy": steps.traefik(),
        "Python": python,
        "date": datetime.now(UTC).date().isoformat(),
        "revision": run("git", "describe", "--always", "--dirty", cwd=HERE),
    }


def publish(results: dict) -> None:
    """Write results.json and all that is made of it."""
    (BENCH / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (BENCH / "figure.svg").write_text(draw(results))
    for readme in (BENCH / "README.md", HERE / "README.md"):
        readme.write_text(rewrite(readme.read_text(), results))


QUIET = 0.5  # load average of a machine that does nothing else
TAGS = sorted({one.tag for one in CONTENDERS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="check against what is published, and write nothing")
    parser.add_argument("--beside", type=Path, metavar="FILE", help="compare what a request costs with this main.py")
    parser.add_argument("--python", default=PYTHONS[0], choices=PYTHONS, help="of all images")
    parser.add_argument("--fail", default="", choices=TAGS, help="break its build, and write nothing")
    arguments = parser.parse_args()
    if arguments.beside and not arguments.beside.is_file():
        parser.error(f"--beside={arguments.beside}: there is no such file")
    if arguments.beside:
        return print_table(compare(arguments.beside, arguments.python))
    extent = SHORT if arguments.short else FULL
    ours = arguments.python == PYTHONS[0]  # what is published and promised is of the image as it ships
    publishes = extent is FULL and ours and not arguments.fail
    at, bench = machine(arguments.python), Run(extent, arguments.python, arguments.fail)

    def save() -> None:
        if publishes and bench.figures:
            found = {"seconds": bench.seconds, "left out": bench.left_out, "figures": bench.figures}
            publish({"machine": at} | found)

    bench.say("start; where the engine has the images already, it takes less")
    if at["load"] > QUIET:
        bench.say(
            f"something else uses this machine, at a load of {at['load']}: ratios may be others than on a quiet one"
        )
    try:
        bench.measure(save)
    except KeyboardInterrupt:
        bench.left_out.append("what would have followed, had nobody interrupted it")
    finally:
        print_table(bench.figures)
        print(*(f"Left out: {one}" for one in bench.left_out), sep="\n")
    published = json.loads((BENCH / "results.json").read_text())["figures"] if extent is SHORT else None
    sys.exit("\n".join(missed(bench.figures, published)) or 0 if ours else 0)


if __name__ == "__main__":
    main()
