"""What the clients of one container see of faults, each brought about on a real engine under constant load."""

import asyncio
import itertools
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime

import httpx
import pytest

from tests.harness import NAME, Container, Image, Load, missing, run, wait_until

WRITABLE = "--tmpfs=/tmp:size=64k"

# PID 1 is the service; another process holds the other end of its log, and does nothing until it gets a signal.
READER = """
import os, signal
reader, writer = os.pipe()
if os.fork():
    os.dup2(writer, 1)
    os.close(reader)
    os.execvp("python", ["python", "main.py"])
os.close(writer)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
signal.sigwait({signal.SIGUSR1})
while ACTS and (data := os.read(reader, 65536)):
    os.write(1, data)
"""
# To all other processes there, the first one excepted.
WAKE_READER = "import os, signal; os.kill(-1, signal.SIGUSR1)"

FAKETIME = """
FROM python:{python}-slim AS debian
RUN apt-get update && apt-get install --yes --no-install-recommends libfaketime=0.9.10*
RUN cp /usr/lib/*/faketime/libfaketime.so.1 /
FROM {image}
COPY --from=debian /libfaketime.so.1 /
ENV LD_PRELOAD=/libfaketime.so.1 FAKETIME_DONT_FAKE_MONOTONIC=1 FAKETIME_NO_CACHE=1 FAKETIME_TIMESTAMP_FILE=/tmp/clock
"""
# Whole at once, since a file that is still empty ends the process that reads it.
SET_BACK = """
import os
with open("/tmp/new", "w") as file:
    file.write("-1h")
os.replace("/tmp/new", "/tmp/clock")
"""


class Clients(Load):
    """Keep-alive clients of a published port, which remember when answers came."""

    def __init__(self, url: str) -> None:
        self.times: list[float] = []
        super().__init__(url, connections=8)

    @property
    def answered(self) -> int:
        return len(self.times)

    @answered.setter
    def answered(self, count: int) -> None:
        if count:
            self.times.append(time.monotonic())

    def silence(self) -> float:
        """The longest time without an answer to anyone."""
        return max(after - before for before, after in itertools.pairwise(self.times))


@contextmanager
def served(image: Image, *arguments: str, flags: tuple[str, ...] = ()) -> Generator[tuple[Container, str]]:
    """A container as `make run` starts it, and the address that its clients use."""
    with image.container(*arguments, flags=("--memory=128m", "--restart=unless-stopped", *flags)) as container:
        yield container, container.url


def under_load(url: str, fault: Callable[[Clients], object], over: Callable[[], bool] = lambda: True) -> Clients:
    """Bring about a fault amid load, which goes on until the fault is over and a thousand answers longer."""

    async def until(load: Clients) -> None:
        await asyncio.to_thread(wait_until, lambda: load.answered > 500)
        await asyncio.to_thread(fault, load)
        await asyncio.to_thread(wait_until, over)
        target = load.answered + 1000
        await asyncio.to_thread(wait_until, lambda: load.answered > target)
        load.over = True

    load = Clients(url)
    asyncio.run(load.run(until))
    print(f"\n{load.answered} answered, {len(load.lost)} lost, {load.silence():.2f} s without an answer")
    return load


@pytest.fixture(autouse=True)
def docker(engine) -> None:
    if engine != "docker":
        missing("Podman restarts and pauses in ways of its own")


GROW = """
@app.post("/grow")
async def grow() -> int:
    return len(b"x" * 2**30)
"""


@pytest.mark.parametrize("fault", ["its process is killed", "it exceeds its memory limit"])
def test_container_serves_again_after(fault, image, variant):
    def end(_) -> None:
        if fault == "its process is killed":
            container.kill()
        else:
            with pytest.raises(httpx.TransportError):
                httpx.post(url + "/grow")

    start = str(time.time())
    with served(image.variant(variant(GROW))) as (container, url):
        load = under_load(url, end, lambda: container.inspect("RestartCount") == 1)
        events = ("--filter=event=die", f"--filter=container={container.id}", "--format={{.Actor.Attributes.exitCode}}")
        statuses = run("docker", "events", f"--since={start}", f"--until={time.time()}", *events)
    assert statuses == "137"
    assert load.lost


def test_container_loses_no_request_while_it_is_paused(image):
    """Its clients wait; Docker calls it unhealthy meanwhile."""
    resumed = []

    def pause(load: Clients) -> None:
        run("docker", "pause", container.id)
        wait_until(lambda: time.monotonic() - load.times[-1] > 2)
        assert container.inspect("State.Health.Status") == "unhealthy"
        resumed.append(time.monotonic())
        run("docker", "unpause", container.id)

    with served(image) as (container, url):
        load = under_load(url, pause, lambda: container.inspect("State.Health.Status") == "healthy")
    (end,) = resumed
    delay = next(moment for moment in load.times if moment > end) - end
    print(f"the first answer {delay:.2f} s after the pause")
    assert load.lost == []
    assert load.silence() > 2


FILL = """
with open("/tmp/full", "wb", 0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError as error:
        print(error.strerror)
"""


def test_container_serves_while_tmp_is_full(image, variant):
    source = variant("""
from fastapi import Request
@app.post("/upload")
async def upload(request: Request) -> int:
    return len(await request.body())
""")

    def fill(_) -> None:
        assert container.python_says(FILL) == "No space left on device"
        assert httpx.post(url + "/upload", content=bytes(2**20)).json() == 2**20

    with served(image.variant(source), flags=(WRITABLE,)) as (container, url):
        load = under_load(url, fill)
    assert load.lost == []


def test_container_serves_while_its_log_is_not_read_and_then_says_how_many_lines_it_lost(image):
    code = READER.replace("ACTS", "True")
    with served(image, "-c", code, flags=("--entrypoint=python",)) as (container, url):
        # More lines than wait in the process and in the pipe: a megabyte, and 64 KB.
        load, more = under_load(url, lambda load: wait_until(lambda: load.answered > 6000)), 0
        container.python_says(WAKE_READER)

        def told() -> bool:
            nonlocal more
            more += httpx.get(url).status_code == 200
            return any("lines lost" in line["message"] for line in container.logs())

        wait_until(told)
        assert container.stop()[0] == 0
        logs = container.logs()  # each line of which is whole, or it is no JSON
    (notice,) = (line for line in logs if "lines lost" in line["message"])
    lost, read = int(notice["message"].split()[0]), sum("http.request.method" in line for line in logs)
    print(f"{lost} lines lost, {read} read")
    assert lost > 0
    assert lost + read == load.answered + more
    assert load.lost == []


def test_container_serves_and_drains_after_the_reader_of_its_log_has_gone(image):
    code = READER.replace("ACTS", "False")
    with served(image, "-c", code, flags=("--entrypoint=python",)) as (container, url):
        load = under_load(url, lambda _: container.python_says(WAKE_READER))
        status, seconds = container.stop()
    assert (status, seconds >= 3) == (0, True)
    assert load.lost == []


def test_container_measures_and_drains_as_before_when_the_clock_is_set_back(image):
    name = f"{NAME}-clock"
    run("docker", "build", "--tag", name, "-", input=FAKETIME.format(python=image.python, image=image.name))
    with served(Image("docker", image.python, name, *image.flags), flags=(WRITABLE,)) as (container, url):
        load = under_load(url, lambda _: container.python_says(SET_BACK))
        assert container.inspect("RestartCount") == 0
        status, seconds = container.stop()
        logs = container.logs()
    moments = [datetime.fromisoformat(line["timestamp"]).timestamp() for line in logs]
    assert min(after - before for before, after in itertools.pairwise(moments)) < -3500
    durations = [line["http.server.request.duration"] for line in logs if "http.request.method" in line]
    assert (len(durations), min(durations) > 0, max(durations) < 60) == (load.answered, True, True)
    assert (status, seconds >= 3) == (0, True)
    assert load.lost == []
