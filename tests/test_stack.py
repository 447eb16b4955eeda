"""What the stack promises: whatever happens to replicas, no request is lost, under a load that checks every answer."""

import asyncio
import ipaddress
import json
import os
import shutil
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import trustme

from tests import harness
from tests.harness import (
    HERE,
    RATE,
    Clients,
    Container,
    Image,
    Load,
    answers,
    free_port,
    frozen,
    missing,
    run,
    wait_until,
)

NAME = f"{harness.NAME}-stack"
SETTING, SECRET = """it's "5 $HOME" # \\n""", "postgresql://user:password@database"


class Stack:
    """What deploy/stack makes of a copy of deploy/ on this machine."""

    service = f"{NAME}_service"

    def __init__(self, directory: Path, image: Image) -> None:
        self.directory = shutil.copytree(HERE / "deploy", directory / "deploy", symlinks=True)
        self.image, ports = image, (free_port(), free_port())
        self.http, self.url = f"http://localhost:{ports[0]}", f"https://localhost:{ports[1]}"
        knobs = {"NAME": NAME, "HTTP_PORT": str(ports[0]), "HTTPS_PORT": str(ports[1]), "NETWORK": "10.91.255"}
        self.environment = os.environ | knobs
        self.keep(SETTING, SECRET)
        self.authority = trustme.CA()
        certificate = self.authority.issue_cert("localhost")
        certificate.cert_chain_pems[0].write_to_path(self.directory / "certificate/tls.crt")
        certificate.private_key_pem.write_to_path(self.directory / "certificate/tls.key")

    def keep(self, setting: str, secret: str) -> None:
        (self.directory / "settings.env").write_text(f"# a comment\nHELLO={setting}\n")
        (self.directory / "secrets/database_url").write_text(secret)

    def deploy(self) -> None:
        run("./stack", cwd=self.directory, env=self.environment | {"IMAGE": self.image.name})

    def say(self, code: str) -> list[str]:
        """What each replica says to this code."""
        return [Container("docker", replica).python_says(code) for replica in self.replicas()]

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
                f"\nchanged at {changed:.3f} s, settled in {seconds:.1f} s, "
                f"{load.answered} answered, {len(load.lost)} lost"
            )

        load = Clients(self.url)
        asyncio.run(load.run(until))
        assert load.lost == []


def remove() -> None:
    """Remove the stack, and wait until its containers and networks are gone, which `--detach=false` at times never sees."""
    run("docker", "stack", "rm", NAME)
    ours = f"--filter=label=com.docker.stack.namespace={NAME}"
    wait_until(
        lambda: not run("docker", "ps", "--all", "--quiet", ours) + run("docker", "network", "ls", "--quiet", ours)
    )


@pytest.fixture(scope="module")
def stack(engine, tmp_path_factory):
    if engine != "docker":
        missing("Swarm is Docker's")
    if run("docker", "info", "--format", "{{.Swarm.LocalNodeState}}") == "inactive":
        run("docker", "swarm", "init", "--advertise-addr=127.0.0.1", "--listen-addr=127.0.0.1")
        node = run("docker", "info", "--format", "{{.Swarm.NodeID}}")
        run("docker", "node", "update", f"--label-add=tests={harness.NAME}", node)  # by which conftest.py leaves it
    stack = Stack(tmp_path_factory.mktemp("stack"), Image.build(engine).rebuilt(frozen()))
    remove()  # what a run that was cut off has left
    try:
        stack.deploy()
        wait_until(lambda: answers(stack.url, verify=False))
        yield stack
    finally:
        remove()


def test_stack_sends_http_to_https(stack):
    answer = httpx.get(f"{stack.http}/items/5?q=a")
    assert (answer.status_code, answer.headers["location"]) == (301, f"{stack.url}/items/5?q=a")


def test_stack_believes_the_proxy_alone_about_the_client(stack):
    forged = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}
    stack.get("/items/1", **forged)
    request = f"Request('http://127.0.0.1/items/2', headers={forged})"
    Container("docker", min(stack.replicas())).python_says(f"from urllib.request import *; urlopen({request})")
    wait_until(lambda: stack.logged("/items/1") and stack.logged("/items/2"))
    (address, scheme), other = (
        (line["client.address"], line["url.scheme"]) for line in map(stack.logged, ("/items/1", "/items/2"))
    )
    proxy = run("docker", "ps", "--quiet", f"--filter=name={NAME}_proxy")
    networks = Container("docker", proxy).inspect("NetworkSettings.Networks").values()
    addresses = {network["IPAddress"] for network in networks if network["IPAddress"]}
    assert (scheme, other) == ("https", ("127.0.0.1", "http"))
    assert ipaddress.ip_address(address) not in map(ipaddress.ip_address, {"203.0.113.7", "127.0.0.1", *addresses})


def test_stack_serves_the_certificate_that_it_is_given(stack):
    context = ssl.create_default_context()
    stack.authority.configure_trust(context)
    wait_until(lambda: answers(stack.url, "/items/5", verify=context))


TELL = "import os; print(os.environ['HELLO'], open('/run/secrets/database_url').read(), sep='\\n')"
RIGHTS = """
import os
with open("/proc/self/status") as status:
    print(*(line.split()[1] for line in status if line.startswith(("CapBnd", "Uid"))))
print(open("/proc/1/cmdline").read().split(chr(0))[0])
files = os.statvfs("/tmp")
print(files.f_blocks * files.f_frsize // 2**20, os.access("/tmp", os.W_OK), os.statvfs("/").f_flag & os.ST_RDONLY)
"""


def test_stack_gives_each_replica_its_settings_and_secrets_as_they_stand_in_their_files(stack):
    assert stack.say(TELL) == [f"{SETTING}\n{SECRET}"] * 3


def test_stack_runs_each_replica_below_an_init_with_no_rights_and_a_bounded_place_for_uploads(stack):
    assert stack.say(RIGHTS) == ["65532 0000000000000000\n/sbin/docker-init\n32 True 1"] * 3


def test_stack_loses_no_request_to_another_setting_and_another_secret(stack):
    old = stack.replicas()
    stack.keep("Moon", "another")
    stack.loses_nothing(stack.deploy, lambda: not old & stack.replicas())
    assert stack.say(TELL) == ["Moon\nanother"] * 3


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
    stack.image = stack.image.rebuilt(
        variant("import sys, time\nif '--prestart' not in sys.argv:\n    time.sleep(3600)")
    )

    def deploy() -> None:
        with pytest.raises(AssertionError, match="rollback_completed"):
            stack.deploy()

    stack.loses_nothing(deploy, lambda: stack.replicas() == before)


@pytest.mark.parametrize("count", [5, 2])
def test_stack_loses_no_request_to_scaling(stack, count):
    stack.loses_nothing(
        lambda: run("docker", "service", "scale", "--detach=false", f"{stack.service}={count}"),
        lambda: len(stack.replicas()) == count,
    )
