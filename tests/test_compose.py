"""What deploy/compose.yaml promises, each by a test on a real engine: one proxy, several replicas, one machine."""

import asyncio
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import main
from tests.harness import HERE, NAME, RATE, Clients, Container, Image, Load, free_port, missing, run, wait_until

COMPOSE = HERE / "deploy/compose.yaml"
NUMBERS = itertools.count(81)
FORGED = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "http", "X-Real-Ip": "203.0.113.7"}


class Member(Container):
    """A container of a stack."""

    def healthy(self) -> bool:
        return self.inspect("State.Health.Status") == "healthy"


class Stack:
    """What `docker compose` makes of compose.yaml with these variables, and with another main.py in every container."""

    def __init__(self, image: str, source: Path | None = None, **environment: str) -> None:
        self.image, self.prefix = image, environment.get("PREFIX", "")
        self.project, network = f"{NAME}-compose-{(number := next(NUMBERS))}", f"10.80.{number}"
        ports = {"HTTP_PORT": str(free_port()), "HTTPS_PORT": str(free_port())}
        self.environment = os.environ | ports | {"IMAGE": image, "NETWORK": network} | environment
        self.url = f"https://localhost:{ports['HTTPS_PORT']}{self.prefix}"
        self.command = ["docker", "compose", "--project-name", self.project, "--file", COMPOSE]
        if source:
            mounted = {"volumes": [f"{source}:/app/main.py:ro"]}
            override = source.with_suffix(".json")
            override.write_text(json.dumps({"services": {"prestart": mounted, "service": mounted}}))
            self.command += ["--file", override]

    def compose(self, *arguments: str) -> str:
        return run(*self.command, *arguments, env=self.environment)

    def containers(self, *services: str) -> list[Member]:
        return [Member("docker", id_) for id_ in self.compose("ps", "--all", "--quiet", *services).splitlines()]

    def access(self, path: str) -> list[dict]:
        """The access lines of this path, of all replicas."""
        lines = map(json.loads, self.compose("logs", "--no-log-prefix", "service").splitlines())
        return [line for line in lines if line.get("url.path") == self.prefix + path]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=False, timeout=60)

    def serves(self) -> bool:
        with self.client() as client:
            return client.get("/livez").status_code == 200

    @contextmanager
    def up(self):
        try:
            self.compose("up", "--detach", "--wait")
            yield self
        finally:
            self.compose("down", "--timeout", "0", "--volumes")


@pytest.fixture(scope="module")
def image(engine) -> str:
    if engine != "docker":
        missing("Traefik reads Docker's socket")
    return Image.build(engine).name


@pytest.fixture(scope="module", params=["", "/api"])
def stack(request, image):
    with Stack(image, PREFIX=request.param).up() as stack:
        yield stack


@pytest.fixture(scope="module")
def client(stack):
    with stack.client() as client:
        yield client


def test_compose_redirects_http_to_https(stack):
    url = f"http://localhost:{stack.environment['HTTP_PORT']}{stack.prefix}/items/5?q=x"
    response = httpx.get(url)
    assert (response.status_code, response.headers["location"]) == (301, f"{stack.url}/items/5?q=x")


def test_compose_spreads_requests_over_replicas_that_are_reachable_through_the_proxy_alone(stack, client):
    replicas = stack.containers("service")
    for _ in range(10):
        client.get("/items/10")
    assert [sum(line.get("url.path") == stack.prefix + "/items/10" for line in c.logs()) for c in replicas] == [5, 5]
    assert not any(container.inspect("HostConfig.PortBindings") for container in replicas)


def test_compose_believes_the_proxy_and_nobody_else(stack):
    """Neither a client of the proxy that forges headers, nor one that comes to a replica without the proxy."""
    proxy, replica = (stack.containers(name)[0].address for name in ("proxy", "service"))
    code = f"""
import httpx, socket
httpx.get("https://{proxy}{stack.prefix}/items/443", verify=False, headers={FORGED})
httpx.get("http://{replica}/items/80", headers={FORGED} | {{"X-Forwarded-Proto": "https"}})
print(socket.gethostbyname(socket.gethostname()))
"""
    network = f"--network={stack.project}_default"
    address = run("docker", "run", "--rm", network, "--entrypoint", "python", stack.image, "-c", code)
    for path, scheme in (("/items/443", "https"), ("/items/80", "http")):
        (line,) = stack.access(path)
        assert (line["client.address"], line["url.scheme"]) == (address, scheme)


def test_compose_makes_links_that_lead_back_through_the_proxy(stack, client):
    response = client.get("/items/5/")
    assert (response.status_code, response.headers["location"]) == (307, f"{stack.url}/items/5")
    servers = client.get("/openapi.json").json().get("servers", [{"url": ""}])
    (server,) = [server["url"] for server in servers]
    assert client.get(f"https://{client.base_url.netloc.decode()}{server}/items/5").json()["item_id"] == 5


def test_compose_serves_nothing_beside_the_prefix(stack, client):
    beside = {"": {"/": 200}, "/api": {"/": 404, "/apiitems/5": 404, "/api": 200}}[stack.prefix]
    host = f"https://{client.base_url.netloc.decode()}"
    assert {path: client.get(host + path).status_code for path in beside} == beside


def test_compose_runs_each_container_with_no_rights_in_a_root_that_is_read_only(stack):
    containers = stack.containers()
    assert len(containers) == 4
    for container in containers:
        host = container.inspect("HostConfig")
        assert (host["ReadonlyRootfs"], host["CapDrop"], host["CapAdd"]) == (True, ["ALL"], None)
        assert (host["SecurityOpt"], host["Privileged"]) == (["no-new-privileges"], False)
        megabytes = 256 if "traefik" in container.inspect("Config.Image") else 128
        assert (host["Memory"], host["PidsLimit"]) == (megabytes * 2**20, 64)
        prestart = container.inspect("Config.Cmd") == ["--prestart"]
        assert host["RestartPolicy"]["Name"] == ("no" if prestart else "unless-stopped")


def test_compose_runs_the_steps_before_starting_once_and_before_all_replicas(stack):
    (prestart,) = stack.containers("prestart")
    assert prestart.inspect("State.ExitCode") == 0
    starts = [replica.inspect("State.StartedAt") for replica in stack.containers("service")]
    assert len(starts) == 2
    assert prestart.inspect("State.FinishedAt") < min(starts)


def test_compose_starts_nothing_when_a_step_before_starting_fails_and_its_log_says_why(image):
    stack = Stack(image, STOP_SECONDS="1")
    try:
        with pytest.raises(AssertionError, match=r"prestart.* didn't complete successfully"):
            stack.compose("up", "--detach", "--wait")
        (line,) = stack.compose("logs", "--no-log-prefix").splitlines()
        states = [container.inspect("State.Status") for container in stack.containers("service", "proxy")]
    finally:
        stack.compose("down", "--volumes")
    assert "STOP_SECONDS" in json.loads(line)["message"]
    assert states == ["created"] * 3


def test_compose_passes_on_every_setting_but_the_port(image):
    service = json.loads(Stack(image, STOP_SECONDS="20").compose("config", "--format", "json"))["services"]["service"]
    settings = {(field.alias or name).upper() for name, field in main.Settings.model_fields.items()}
    assert settings - set(service["environment"]) == {"PORT"}
    assert (service["environment"]["STOP_SECONDS"], service["stop_grace_period"]) == ("20", "20s")


def test_compose_asks_for_a_certificate_when_a_domain_is_set(image):
    server = f"https://127.0.0.1:{free_port()}/directory"
    with Stack(image, DOMAIN="example.org", EMAIL="me@example.org", ACME_SERVER=server).up() as stack:
        wait_until(lambda: server in stack.compose("logs", "proxy"))
        assert '"domains":["example.org"]' in stack.compose("logs", "proxy")


def restart(stack: Stack) -> None:
    replica = stack.containers("service")[0]
    run("docker", "restart", replica.id)
    wait_until(replica.healthy)


def kill(stack: Stack) -> None:
    replica = stack.containers("service")[-1]
    replica.kill()
    wait_until(lambda: replica.inspect("RestartCount") and replica.healthy())


def update(stack: Stack) -> None:
    old = {replica.id for replica in stack.containers("service")}
    knobs = ("ENGINE=docker", f"IMAGE={stack.image}", f"NAME={stack.project}")
    run("make", "update", *knobs, cwd=HERE, env=stack.environment)
    new = {replica.id for replica in stack.containers("service")}
    assert (len(new), old & new) == (2, set())


@pytest.mark.parametrize("stack", [""], indirect=True)
@pytest.mark.parametrize("event", [kill, update, restart])
def test_compose_loses_no_request_when_it_is_under_load_and(event, stack):
    async def happen(load: Load) -> None:
        for action in (lambda _: None, event):
            await asyncio.to_thread(action, stack)
            target = load.answered + RATE
            while load.answered < target:
                await asyncio.sleep(0.02)
        load.over = True

    load = Clients(stack.url)
    asyncio.run(load.run(happen))
    print(f"{event.__name__}: {load.answered} requests answered, {len(load.lost)} lost")
    assert not load.lost


FATAL = """
from fastapi import Request
import time
@app.post("/hang")
async def hang():
    time.sleep(600)
@app.post("/grow")
async def grow():
    return len(b"x" * 2**30)
@app.api_route("/slow", methods=["GET", "POST"])
async def slow(request: Request) -> str:
    print(request.method, "has begun")
    await asyncio.sleep(2)
    return "done"
"""


@pytest.mark.parametrize("cause", ["kill", "grow", "hang"])
def test_compose_serves_at_once_and_again_after(cause, image, variant):
    stack = Stack(image, variant(FATAL), REPLICAS="1", HANG_SECONDS="3")
    with stack.up(), stack.client() as client, ThreadPoolExecutor() as pool:
        assert stack.serves()
        (replica,) = stack.containers("service")
        if cause == "kill":
            replica.kill()
        else:
            pool.submit(client.post, f"/{cause}")
        seconds = wait_until(lambda: replica.inspect("RestartCount") and stack.serves())
    print(f"{cause}: the only replica serves again after {seconds:.1f} s")


@pytest.mark.parametrize(("method", "status", "times"), [("GET", 200, 2), ("POST", 502, 1)])
def test_compose_repeats_a_request_that_a_replica_died_of_unless_it_may_have_had_its_effect(
    method, status, times, image, variant
):
    begun = f"{method} has begun"
    with Stack(image, variant(FATAL)).up() as stack, stack.client() as client, ThreadPoolExecutor() as pool:
        response = pool.submit(client.request, method, "/slow")
        wait_until(lambda: begun in stack.compose("logs", "service"))
        replica = next(replica for replica in stack.containers("service") if begun in str(replica.logs()))
        replica.kill()
        assert response.result().status_code == status
        assert stack.compose("logs", "service").count(begun) == times
