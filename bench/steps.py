"""What is measured of a container: start, loads, with a proxy or without, and stop."""

import asyncio
import json
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple, Self
from urllib.error import HTTPError
from urllib.request import urlopen

import httpx

from bench.contenders import (
    BEHIND,
    ITEM,
    LOST,
    READY,
    START,
    WALL,
    Contender,
    Extent,
    per_cpu_second,
    under,
)
from bench.images import WRK, Found
from tests.harness import HERE, Container, Load, answers, run, wait_until

PROBES = ("/readyz", "/healthz", "/livez", "/health")  # that a service may have; "/" where it has none


# --- A container ---


def ask(url: str) -> int:
    """The status of an answer; 0 where there is none."""
    try:
        with urlopen(url, timeout=1) as response:
            return response.status
    except HTTPError as error:
        return error.code
    except (OSError, HTTPException):
        return 0


@contextmanager
def running(contender: Contender, *flags: str):
    """A container as `docker run --detach IMAGE` starts it, which may not answer yet."""
    container = Container("docker", run("docker", "run", "--detach", *flags, contender.image, *contender.command))
    try:
        # Without the engine's proxy of published ports in between.
        container.url = f"http://{container.address}:{contender.port}"
        yield container
    finally:
        run("docker", "rm", "--force", "--volumes", container.id)


@contextmanager
def started(contender: Contender, *flags: str):
    """A container that answers, and its figures until then.

    The second of CPU time has the health checks in it that the image asks for.
    """
    start = time.monotonic()
    with running(contender, *flags) as container:
        pid = container.inspect("State.Pid")
        wait_until(lambda: ask(container.url) == 200, 60)
        yield (
            container,
            {
                WALL: time.monotonic() - start,
                START: cpu_seconds(pid),
                f"{START}, health checks included": container_cpu_seconds(container),
                READY: resident_megabytes(pid),
            },
        )


def threads(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").iterdir())


def processes(pid: int) -> list[int]:
    """This process and all that it and its children have started."""
    children = [int(child) for thread in threads(pid) for child in (thread / "children").read_text().split()]
    return [pid, *(process for child in children for process in processes(child))]


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process and of those below it."""
    files = (thread / "schedstat" for process in processes(pid) for thread in threads(process))
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def resident_megabytes(pid: int) -> float:
    """Of a process and those below it; what they share counts once in each."""
    texts = (Path(f"/proc/{process}/status").read_text() for process in processes(pid))
    return sum(int(text.partition("VmRSS:")[2].split()[0]) for text in texts) / 1000


def container_cpu_seconds(container: Container) -> float:
    """Of all its processes so far, as the engine reads them from its cgroup, of version 1 or 2."""
    with httpx.Client(transport=httpx.HTTPTransport(uds="/var/run/docker.sock")) as engine:
        stats = engine.get(f"http://docker/containers/{container.id}/stats?stream=false&one-shot=true").json()
    return stats["cpu_stats"]["cpu_usage"]["total_usage"] / 1e9


# --- Loads ---


class Answers(NamedTuple):
    """To a load: their number, seconds, CPU seconds of the container, and milliseconds of two percentiles."""

    requests: int
    seconds: float
    cpu: float
    p50: float
    p99: float

    @property
    def microseconds(self) -> float:
        """Of CPU for a request."""
        return self.cpu / self.requests * 1e6


class Wrk:
    """wrk, in a container of its own that waits to be told what to load."""

    def __enter__(self) -> Self:
        self.id = run("docker", "run", "--detach", "--network=host", "--init", WRK)
        return self

    def __exit__(self, *_) -> None:
        run("docker", "rm", "--force", self.id)

    def send(self, container: Container, path: str, connections: int, seconds: int, url: str = "") -> Answers:
        """Load this container, whose own address is asked or this one in front of it."""
        limits = (f"--connections={connections}", f"--duration={seconds}")
        before = container_cpu_seconds(container)
        output = run("docker", "exec", self.id, "/load", *limits, (url or container.url) + path)
        spent = container_cpu_seconds(container) - before
        report = json.loads(output.splitlines()[-1])
        assert report["failed"] == 0, report
        return Answers(report["requests"], report["duration"] / 1e6, spent, report["p50"] / 1e3, report["p99"] / 1e3)

    def load(self, container: Container, path: str, connections: int, seconds: int, url: str = "") -> Found:
        """What is published of such a load."""
        sent, suffix = self.send(container, path, connections, seconds, url), under(path, connections)
        return {
            per_cpu_second(path, connections): sent.requests / sent.cpu,
            f"requests per second, {suffix}": sent.requests / sent.seconds,
            f"ms, 50th percentile, {suffix}": sent.p50,
            f"ms, 99th percentile, {suffix}": sent.p99,
        }


def measure_round(contender: Contender, wrk: Wrk, extent: Extent) -> Found:
    """All that differs from time to time: start, loads, stop."""
    with started(contender) as (container, found):
        wrk.load(container, ITEM, 64, 1)  # to warm up
        for path, connections in extent.loads:
            found |= wrk.load(container, path, connections, extent.seconds)
        found["MB of memory after the loads"] = resident_megabytes(container.inspect("State.Pid"))
        return found | {LOST: lost(container)}


# As in deploy/compose.yaml: HTTPS in front, and connections to the replica that are kept for 60 s.
PROXY = """
http:
  routers: {{service: {{rule: PathPrefix(`/`), service: service, tls: {{}}}}}}
  services: {{service: {{loadBalancer: {{servers: [{{url: "{url}"}}]}}}}}}
"""
PROXY_FLAGS = (
    "--providers.file.filename=/proxy.yaml",
    "--entrypoints.https.address=:443",
    "--serverstransport.forwardingtimeouts.idleconntimeout=60s",
    "--global.checknewversion=false",
)


@cache
def traefik() -> str:
    """The proxy's image, as deployments take it."""
    return run("bash", "-c", ". ./environment && echo $TRAEFIK", cwd=HERE / "deploy")


@contextmanager
def proxied(container: Container):
    """The URL of a proxy in front of this container."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "proxy.yaml"
        file.write_text(PROXY.format(url=container.url))
        proxy = Container("docker", run("docker", "create", traefik(), *PROXY_FLAGS))
        try:
            run("docker", "cp", file, f"{proxy.id}:/proxy.yaml")
            run("docker", "start", proxy.id)
            yield f"https://{proxy.address}"
        finally:
            run("docker", "rm", "--force", "--volumes", proxy.id)


def behind_proxy(contender: Contender, wrk: Wrk, extent: Extent) -> Found:
    """What requests cost the replica that a proxy sends it, whose forwarded headers it trusts, as in a deployment."""
    with started(contender, "--env=FORWARDED_ALLOW_IPS=*") as (container, _), proxied(container) as url:
        wait_until(lambda: answers(url, ITEM, verify=False))
        wrk.load(container, ITEM, 64, 1, url)  # to warm up
        found = wrk.load(container, ITEM, 64, extent.seconds, url)
    return {measure + BEHIND: figure for measure, figure in found.items()}


# --- What an operator sees ---


def find_probe(container: Container) -> str:
    return next((path for path in PROBES if ask(container.url + path) == 200), "/")


def lost(container: Container) -> int:
    """Requests that clients lose which watch a probe and stop when it fails, while `docker stop` stops what they use."""

    async def stop(load: Load) -> None:
        await asyncio.sleep(1)  # of load
        process = await asyncio.create_subprocess_exec("docker", "stop", container.id, stdout=subprocess.DEVNULL)
        await load.watch()
        await process.wait()

    clients = Load(container.url, 32, find_probe(container))
    asyncio.run(clients.run(stop))
    assert clients.answered, clients.lost[-1:]
    return len(clients.lost)


def observe(contender: Contender) -> Found:
    """What one container, that nobody else uses, writes of a request, and how it goes when it is stopped."""
    with started(contender) as (container, _), ThreadPoolExecutor(1) as thread:
        probe = container.url + find_probe(container)
        assert ask(container.url + ITEM) == 200
        start = time.monotonic()
        stop = thread.submit(container.stop)
        served, unready = 0.0, False
        while not stop.done():
            if ask(container.url + ITEM) == 200:
                served = time.monotonic() - start
                unready |= ask(probe) >= 500
            time.sleep(0.02)
        return {
            "log: a line for each request": any("/items/5" in str(line) for line in container.logs()),
            "readiness: a probe fails before the service does": unready,
            "drain: new connections are served for a second and more": served >= 1,
            "seconds from SIGTERM to exit, idle": stop.result()[1],
        }
