"""Who is measured, how much, and what is to be reached."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tests import harness

BENCH = Path(__file__).parent
NAME = harness.NAME.removesuffix("-test") + "-bench"  # of this checkout: what it names in the engine meets no other's


@dataclass(frozen=True)
class Contender:
    """What is measured: a folder with a Dockerfile, and the file that its user edits, both in this repository."""

    name: str
    directory: str
    app: str
    tag: str
    build: tuple[str, ...] = ()
    port: int = 80
    command: tuple[str, ...] = ()  # in the place of the image's own; such a one has no image of its own

    @property
    def image(self) -> str:
        return f"{NAME}:{self.tag}"


def floor(name: str, app: str, packages: str) -> Contender:
    tag = app.removesuffix(".py")
    return Contender(
        name, "bench/floors", f"bench/floors/{app}", tag, (f"--build-arg=APP={app}", f"--build-arg=PACKAGES={packages}")
    )


OURS = Contender("this project", ".", "main.py", "ours")
GUIDE = Contender("guide", "bench/guide", "bench/guide/app/main.py", "guide")
WORKERS = replace(
    GUIDE, name="guide, 2 workers", command=("fastapi", "run", "app/main.py", "--port", "80", "--workers", "2")
)
GRANIAN = Contender("guide on granian", "bench/granian", GUIDE.app, "granian")
UV = Contender("uv example", "bench/uv", "bench/uv/src/uv_docker_example/__init__.py", "uv", port=8000)
BARE = floor("bare FastAPI", "bare_fastapi.py", "fastapi uvicorn uvloop httptools")
ASGI = floor("bare ASGI", "bare_asgi.py", "uvicorn uvloop httptools")
CONTENDERS = (OURS, GUIDE, WORKERS, GRANIAN, UV, BARE, ASGI)

# The two that a record of the log is measured of, each with the other's choice: ours without, bare FastAPI with uvicorn's.
SILENT = replace(OURS, name="this project, no log", command=("--no-access-log",))
LOGGING = replace(BARE, name="bare FastAPI, log", command=("uvicorn", "main:app", "--host", "0.0.0.0", "--port", "80"))

CHANGED = replace(OURS, name="changed", tag="changed")  # this project with another main.py

ITEM, WAIT = "/items/5?q=somequery", "/wait"
# Each app of FastAPI gets this operation before it is built; bare ASGI has its like.
WAITING = f'''

import asyncio


@app.get("{WAIT}")
async def wait() -> None:
    await asyncio.sleep(0.05)


'''


@dataclass(frozen=True)
class Extent:
    """How much is measured; the loads are (path, connections), each for so many seconds."""

    rounds: int
    seconds: int
    contenders: tuple[Contender, ...]
    loads: tuple[tuple[str, int], ...]
    proxied: tuple[Contender, ...]
    costs: bool  # whether to measure what bench/costs.py has

    def expected(self) -> int:
        """Seconds that a run takes on 2 cores where the engine has none of the images yet."""
        images = len({contender.tag for contender in self.contenders})
        turn = 4 + len(self.loads) * (self.seconds + 0.5)
        turns = len(self.contenders) * turn + len(self.proxied) * (4 + self.seconds)
        return round(20 + images * 12 + len(self.contenders) * 2 + self.rounds * turns + 40 * self.costs)


FULL = Extent(3, 2, CONTENDERS, ((ITEM, 1), (ITEM, 64), (ITEM, 256), (WAIT, 256)), (OURS, GUIDE), True)
SHORT = Extent(2, 2, (OURS, GUIDE, BARE), ((ITEM, 1), (ITEM, 64)), (), False)
LIMIT = 480  # seconds that a run takes at most: a round that would end later is left out

LOST, COMPRESSED = "requests lost when stopped under load", "MB compressed"
START, READY = "CPU seconds to the first answer", "MB of memory when ready"
WALL = "seconds to the first answer"
REQUESTS, MEMORY = 100_000, 64  # so many, in a container limited to so many MB
FIRST = "first answer's time, of the hundredth's"
RECORD = "µs of CPU for a request's record in the access log"
GROWN = f"MB of memory after {REQUESTS:,} requests in {MEMORY} MB, of when ready"
BEHIND = ", behind the proxy"


def per_cpu_second(path: str, connections: int) -> str:
    return f"requests per CPU second, {under(path, connections)}"


def under(path: str, connections: int) -> str:
    return f"{path}, {connections} connection{'s' * (connections > 1)}"


class Goal(NamedTuple):
    """A bound of a ratio, this project's figure over another's; without another, of the worst of this project's."""

    measure: str
    other: Contender | None
    bound: float
    steady: bool = True  # enough for a short run to judge it


GOALS = (
    Goal(per_cpu_second(ITEM, 64), GUIDE, 2),
    Goal(per_cpu_second(ITEM, 1), GUIDE, 1.7),
    Goal(per_cpu_second(ITEM, 64) + BEHIND, GUIDE, 1.7),
    Goal(f"ms, 99th percentile, {under(ITEM, 64)}", GUIDE, 0.45, steady=False),
    Goal(START, GUIDE, 0.4),
    Goal(WALL, GUIDE, 1, steady=False),
    Goal(READY, GUIDE, 0.62),
    Goal(LOST, None, 0),
    Goal(per_cpu_second(ITEM, 64), BARE, 1),
    Goal(per_cpu_second(ITEM, 1), BARE, 0.92),
    Goal(RECORD, BARE, 1),
    Goal(FIRST, None, 30),
    Goal(GROWN, None, 1.2),
)


def more_is_better(measure: str) -> bool:
    return measure.startswith("requests per")
