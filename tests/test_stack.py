"""What the stack promises: whatever happens to replicas, no request is lost, under a load that checks every answer."""

import asyncio
import json
import os
import time
from collections.abc import Callable

import httpx
import pytest

from tests import harness
from tests.harness import HERE, RATE, Clients, Container, Image, Load, free_port, missing, run, wait_until

NAME = f"{harness.NAME}-stack"


class Stack:
    """deploy/stack.yaml on this machine."""

    service = f"{NAME}_service"

    def __init__(self, image: Image) -> None:
        self.image, ports = image, (free_port(), free_port())
        self.http, self.url = f"http://127.0.0.1:{ports[0]}", f"https://127.0.0.1:{ports[1]}"
        self.environment = os.environ | {"HTTP_PORT": str(ports[0]), "HTTPS_PORT": str(ports[1])}

    def deploy(self) -> None:
        command = "docker stack deploy --compose-file deploy/stack.yaml --resolve-image never --detach=false --quiet"
        run(*command.split(), NAME, cwd=HERE, env=self.environment | {"IMAGE": self.image.name})

    def replicas(self, *flags: str) -> set[str]:
        return {*run("docker", "ps", "--quiet", f"--filter=name={self.service}", *flags).splitlines()}

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, verify=False)

    def logged(self, path: str) -> dict:
        """The access line of the request for this path."""
        logs = run("docker", "service", "logs", "--raw", self.service)
        return next((line for line in map(json.loads, logs.splitlines()) if line.get("url.path") == path), {})

    def loses_nothing(self, change: Callable[[], object], settled: Callable[[], bool]) -> None:
        """Make a change after a second of load, which goes on until the change has settled and a second longer."""

        async def until(_: Load) -> None:
            await asyncio.to_thread(wait_until, lambda: load.answered > RATE)
            start = time.monotonic()
            await asyncio.to_thread(change)
            await asyncio.to_thread(wait_until, settled, 120)
            changed, seconds, answered = start - load.start, time.monotonic() - start, load.answered
            await asyncio.to_thread(wait_until, lambda: load.answered > answered + RATE)
            load.over = True
            print(
                f"\nchanged at {changed:.3f} s, settled in {seconds:.1f} s, {load.answered} answered, {len(load.lost)} lost"
            )

        load = Clients(self.url)
        asyncio.run(load.run(until))
        assert load.lost == []


@pytest.fixture(scope="module")
def stack(engine):
    if engine != "docker":
        missing("Swarm is Docker's")
    if alone := run("docker", "info", "--format", "{{.Swarm.LocalNodeState}}") == "inactive":
        run("docker", "swarm", "init", "--advertise-addr=127.0.0.1", "--listen-addr=127.0.0.1")
    stack = Stack(Image.build(engine))
    run("docker", "stack", "rm", "--detach=false", NAME)  # what a run that was cut off has left
    try:
        stack.deploy()
        wait_until(lambda: stack.get("/livez").status_code == 200)
        yield stack
    finally:
        run("docker", "stack", "rm", "--detach=false", NAME)
        if alone:
            run("docker", "swarm", "leave", "--force")


def test_stack_sends_http_to_https(stack):
    answer = httpx.get(f"{stack.http}/items/5?q=a")
    assert (answer.status_code, answer.headers["location"]) == (301, f"{stack.url}/items/5?q=a")


def test_stack_believes_the_proxy_alone_about_the_client(stack):
    forged = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}
    stack.get("/items/1", **forged)
    request = f"Request('http://127.0.0.1/items/2', headers={forged})"
    Container("docker", min(stack.replicas())).python_says(f"from urllib.request import *; urlopen({request})")
    wait_until(lambda: stack.logged("/items/1") and stack.logged("/items/2"))
    gateway = run("docker", "network", "inspect", "--format", "{{(index .IPAM.Config 0).Gateway}}", "docker_gwbridge")
    seen = [(line["client.address"], line["url.scheme"]) for line in map(stack.logged, ("/items/1", "/items/2"))]
    assert seen == [(gateway, "https"), ("127.0.0.1", "http")]


def test_stack_loses_no_request_to_an_update(stack, variant):
    old = stack.replicas()
    stack.image = stack.image.rebuilt(variant('@app.get("/version")\nasync def version() -> int:\n    return 2'))
    stack.loses_nothing(stack.deploy, lambda: not old & stack.replicas())
    assert stack.get("/version").text == "2"


def test_stack_loses_no_request_to_a_replica_that_is_killed(stack):
    (killed, *_) = before = stack.replicas()
    stack.loses_nothing(
        Container("docker", killed).kill,
        lambda: len(stack.replicas("--filter=health=healthy") - {killed}) == len(before),
    )


def test_stack_loses_no_request_to_a_version_that_never_gets_ready_and_is_rolled_back(stack, variant):
    before = stack.replicas()
    stack.image = stack.image.rebuilt(variant("import time\ntime.sleep(3600)"))
    stack.loses_nothing(stack.deploy, lambda: stack.replicas() == before)
    state = run("docker", "service", "inspect", "--format", "{{.UpdateStatus.State}}", stack.service)
    assert state == "rollback_completed"


@pytest.mark.parametrize("count", [5, 2])
def test_stack_loses_no_request_to_scaling(stack, count):
    stack.loses_nothing(
        lambda: run("docker", "service", "scale", "--detach=false", f"{stack.service}={count}"),
        lambda: len(stack.replicas()) == count,
    )
