"""What deploy/compose.yaml promises, each by a test on a real engine: one proxy, several replicas, one machine."""

import asyncio
import itertools
import json
import os
import random
import re
import shutil
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import trustme

from tests.harness import (
    HERE,
    LIMITS,
    NAME,
    RATE,
    Clients,
    Container,
    Image,
    Load,
    answers,
    found,
    free_port,
    frozen,
    make,
    missing,
    run,
    wait_until,
)

NUMBERS = itertools.count(random.randrange(200))
FORGED = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "http", "X-Real-Ip": "203.0.113.7"}
SETTING, SECRET = """it's "5 $HOME" # \\n""", "postgresql://user:password@database"


class Member(Container):
    """A container of a stack."""

    def healthy(self) -> bool:
        return self.inspect("State.Health.Status") == "healthy"


class Stack:
    """What deploy/up makes of a copy of deploy/ with these knobs, and with another main.py in every replica."""

    def __init__(self, directory: Path, image: str, source: Path | None = None, **knobs: str) -> None:
        self.directory = shutil.copytree(HERE / "deploy", directory / "deploy", symlinks=True)
        number = next(NUMBERS)
        self.name, self.image, self.prefix = f"{NAME}-compose-{number}", image, knobs.get("PREFIX", "")
        self.http_port, self.https_port = free_port(), free_port()
        ports = {"HTTP_PORT": str(self.http_port), "HTTPS_PORT": str(self.https_port)}
        network = f"10.{90 + number // 250}.{number % 250}"
        self.environment = os.environ | ports | {"NAME": self.name, "IMAGE": image, "NETWORK": network} | knobs
        self.url = f"https://localhost:{self.https_port}{self.prefix}"
        self.override("proxy", f'ports: !override ["127.0.0.1:{self.http_port}:80", "127.0.0.1:{self.https_port}:443"]')
        if source:
            for name in ("prestart", "service"):
                self.override(name, f'volumes: ["{source}:/app/main.py:ro"]')

    def override(self, service: str, line: str) -> None:
        """Add to a service what its user adds to his own copy."""
        file = self.directory / "compose.override.yaml"
        text = file.read_text() if file.exists() else "services:\n"
        file.write_text(f"{text}  {service}: {{ {line} }}\n")

    def keep(self, setting: str, secret: str) -> None:
        (self.directory / "settings.env").write_text(f"# a comment\nHELLO={setting}\n")
        (self.directory / "secrets/database_url").write_text(secret)

    def update(self) -> str:
        return run("./up", cwd=self.directory, env=self.environment)

    def compose(self, *arguments: str) -> str:
        return run("docker", "compose", *arguments, cwd=self.directory, env=self.environment)

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
            self.update()
            yield self
        finally:
            self.compose("--profile", "*", "down", "--timeout", "0", "--volumes")


@pytest.fixture(scope="module")
def image(engine) -> str:
    if engine != "docker":
        missing("Traefik reads Docker's socket")
    return Image.build(engine).rebuilt(frozen()).name


@pytest.fixture(scope="module", params=["", "/api"])
def stack(request, image, tmp_path_factory):
    stack = Stack(tmp_path_factory.mktemp("stack"), image, PREFIX=request.param)
    stack.keep(SETTING, SECRET)
    with stack.up():
        yield stack


@pytest.fixture(scope="module")
def client(stack):
    with stack.client() as client:
        yield client


def test_compose_redirects_http_to_https(stack):
    url = f"http://localhost:{stack.http_port}{stack.prefix}/items/5?q=x"
    response = httpx.get(url)
    assert (response.status_code, response.headers["location"]) == (301, f"{stack.url}/items/5?q=x")


def test_compose_spreads_requests_over_replicas_that_are_reachable_through_the_proxy_alone(stack, client):
    replicas = stack.containers("service")
    for _ in range(10):
        client.get("/items/10")
    wait_until(lambda: len(stack.access("/items/10")) == 10)
    assert [sum(line.get("url.path") == stack.prefix + "/items/10" for line in c.logs()) for c in replicas] == [5, 5]
    assert not any(container.inspect("HostConfig.PortBindings") for container in replicas)


def test_compose_believes_the_proxy_and_nobody_else(stack):
    """Neither a client of the proxy that forges headers, nor one that comes to a replica without the proxy."""
    code = f"""
import httpx, socket
httpx.get("https://proxy{stack.prefix}/items/443", verify=False, headers={FORGED})
httpx.get("http://service/items/80", headers={FORGED} | {{"X-Forwarded-Proto": "https"}})
print(socket.gethostbyname(socket.gethostname()))
"""
    network = f"--network={stack.name}_default"
    address = run("docker", "run", "--rm", network, "--entrypoint", "python", stack.image, "-c", code)
    for path, scheme in (("/items/443", "https"), ("/items/80", "http")):
        (line,) = found(stack.access, path)
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
    assert len(containers) == 5
    for container in containers:
        host = container.inspect("HostConfig")
        assert (host["ReadonlyRootfs"], host["CapDrop"], host["CapAdd"]) == (True, ["ALL"], None)
        assert (host["SecurityOpt"], host["Privileged"], host["Init"]) == (["no-new-privileges"], False, True)
        megabytes = 256 if "traefik" in container.inspect("Config.Image") else 128
        assert (host["Memory"], host["PidsLimit"]) == (megabytes * 2**20, int(LIMITS["pids-limit"]))
        prestart = container.inspect("Config.Cmd") == ["--prestart"]
        assert host["RestartPolicy"]["Name"] == ("no" if prestart else "unless-stopped")


def test_compose_gives_each_replica_its_settings_and_secrets_as_they_stand_in_their_files(stack):
    code = "import os; print(os.environ['HELLO'], open('/run/secrets/database_url').read(), sep='\\n')"
    for replica in stack.containers("service"):
        assert replica.python_says(code).splitlines() == [SETTING, SECRET]


FILL = """
import errno
with open("/tmp/file", "wb", 0) as file:
    try:
        while file.tell() < 2**30:
            file.write(bytes(2**20))
    except OSError as error:
        print(file.tell() // 2**20, errno.errorcode[error.errno])
    file.truncate(0)
"""


def test_compose_gives_each_replica_a_place_for_uploads_that_is_bounded(stack):
    assert stack.containers("service")[0].python_says(FILL) == "32 ENOSPC"


ORPHAN = """
import os, time
read, write = os.pipe()
if not os.fork():
    if orphan := os.fork():
        os.write(write, str(orphan).encode())
    os._exit(0)
os.wait()
orphan = os.read(read, 9).decode()
for _ in range(100):
    if not os.path.exists(f"/proc/{orphan}"):
        break
    time.sleep(0.1)
else:
    print("a zombie")
"""


def test_compose_takes_in_the_children_that_others_have_left(stack):
    assert stack.containers("service")[0].python_says(ORPHAN) == ""


ASK = """
import http.client, sys
for method, path in [line.split() for line in sys.argv[1].split(";")]:
    connection = http.client.HTTPConnection("engine", 2375)
    connection.request(method, path)
    print(connection.getresponse().status)
"""


def test_compose_lets_the_proxy_ask_the_engine_for_the_replicas_and_for_nothing_else(stack):
    for container in stack.containers("proxy", "service"):
        assert not [mount for mount in container.inspect("Mounts") if "docker.sock" in mount["Source"]]
    (engine,) = stack.containers("engine")
    allowed = ["GET /version", "GET /v1.44/containers/json", f"GET /v1.44/containers/{engine.id}/json"]
    refused = ["POST /v1.44/containers/create", f"DELETE /containers/{engine.id}", "GET /v1.44/secrets", "GET /"]
    refused += [f"GET /containers/{engine.id}/logs", "GET /containers/json/../../secrets", "GET /images/json"]
    network = f"--network={stack.name}_engine"
    questions = ("--entrypoint=python", stack.image, "-c", ASK, ";".join(allowed + refused))
    answers = run("docker", "run", "--rm", network, *questions).split()
    assert answers == ["200"] * len(allowed) + ["403"] * len(refused)


def test_compose_runs_the_steps_before_starting_once_and_before_all_replicas(stack):
    (prestart,) = stack.containers("prestart")
    assert prestart.inspect("State.ExitCode") == 0
    starts = [replica.inspect("State.StartedAt") for replica in stack.containers("service")]
    assert len(starts) == 2
    assert prestart.inspect("State.FinishedAt") < min(starts)


def test_compose_starts_nothing_when_a_step_before_starting_fails_and_its_log_says_why(image, tmp_path):
    stack = Stack(tmp_path, image)
    (stack.directory / "settings.env").write_text("LOG_LEVEL=loud\n")
    try:
        with pytest.raises(AssertionError, match=r"LOG_LEVEL.*loud"):
            stack.update()
        states = [container.inspect("State.Status") for container in stack.containers("service", "proxy")]
    finally:
        stack.compose("down", "--volumes")
    assert states == ["created"] * 3


def test_compose_serves_the_host_that_it_is_told_and_asks_for_its_certificate(image, tmp_path):
    server = f"https://127.0.0.1:{free_port()}/directory"
    stack = Stack(tmp_path, image, HOST="example.org", EMAIL="me@example.org", ACME_SERVER=server)
    with stack.up(), stack.client() as client:
        wait_until(lambda: server in stack.compose("logs", "proxy"))
        assert '"domains":["example.org"]' in stack.compose("logs", "proxy")
        statuses = [client.get("/", headers={"Host": host}).status_code for host in ("example.org", "localhost")]
    assert statuses == [200, 404]


def give_certificate(directory: Path) -> trustme.CA:
    """Put a certificate for localhost where the proxy takes it from; who has signed it."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.private_key_pem.write_to_path(directory / "certificate/tls.key")
    certificate.cert_chain_pems[0].write_to_path(directory / "certificate/tls.crt")
    return authority


def test_compose_serves_a_certificate_that_it_is_given_and_a_service_in_a_second_network(image, tmp_path):
    stack = Stack(tmp_path, image)
    stack.override("service", "networks: {default: {}, database: {}}")
    override = stack.directory / "compose.override.yaml"
    override.write_text(override.read_text() + "networks: {database: {internal: true}}\n")
    context = ssl.create_default_context()
    give_certificate(stack.directory).configure_trust(context)
    with stack.up(), httpx.Client(base_url=stack.url, verify=context, timeout=5) as client:
        assert [client.get("/items/5").status_code for _ in range(10)] == [200] * 10


@pytest.mark.parametrize("prefix", ["api/v1", "/api/v1", "/api/v1/"])
def test_make_takes_a_prefix_as_people_write_it(prefix):
    assert make("--eval=show: ; @echo $$PREFIX", "show", f"PREFIX={prefix}") == (0, "/api/v1\n")


def test_manifests_pin_the_same_proxy_by_version_and_digest():
    texts = [(HERE / f"deploy/{name}.yaml").read_text() for name in ("compose", "stack")]
    (pin,) = {*re.findall(r"image: \$\{TRAEFIK:-(.*)\}", "".join(texts))}
    assert re.fullmatch(r"traefik:v\d+\.\d+\.\d+@sha256:[0-9a-f]{64}", pin)


def restart(stack: Stack) -> None:
    replica = stack.containers("service")[0]
    run("docker", "restart", replica.id)
    wait_until(replica.healthy)


def kill(stack: Stack) -> None:
    replica = stack.containers("service")[-1]
    replica.kill()
    wait_until(lambda: replica.inspect("RestartCount") and replica.healthy())


def update(stack: Stack) -> None:
    """With another setting and another secret, which the new replicas have."""
    old = {replica.id for replica in stack.containers("service")}
    stack.keep("Moon", "another")
    stack.update()
    new = stack.containers("service")
    assert (len(new), old & {replica.id for replica in new}) == (2, set())
    code = "import os; print(os.environ['HELLO'], open('/run/secrets/database_url').read())"
    assert [replica.python_says(code) for replica in new] == ["Moon another"] * 2


@pytest.mark.parametrize("stack", [""], indirect=True)
@pytest.mark.parametrize("event", [kill, update, restart])
def test_compose_loses_no_request_when_it_is_under_load_and(event, stack):
    async def happen(load: Load) -> None:
        for action in (lambda _: None, event):
            await asyncio.to_thread(action, stack)
            target = load.answered + RATE
            await asyncio.to_thread(wait_until, lambda target=target: load.answered >= target)
        load.over = True

    load = Clients(stack.url)
    asyncio.run(load.run(happen))
    print(f"{event.__name__}: {load.answered} requests answered, {len(load.lost)} lost")
    assert not load.lost


FATAL = """
import os, time
from fastapi import Request
@app.post("/hang")
async def hang():
    time.sleep(600)
@app.post("/grow")
async def grow():
    return len(b"x" * 2**30)
@app.api_route("/die/{replica}", methods=["GET", "POST"])
async def die(replica: str, request: Request) -> str:
    print(request.method, "has begun", flush=True)
    if os.uname().nodename == replica:
        os.kill(os.getpid(), 9)
    return "done"
"""


@pytest.mark.parametrize("cause", ["kill", "grow", "hang"])
def test_compose_serves_at_once_and_again_after(cause, image, variant, tmp_path):
    stack = Stack(tmp_path, image, variant(FATAL), REPLICAS="1", HANG_SECONDS="3")
    with stack.up(), stack.client() as client, ThreadPoolExecutor() as pool:
        assert stack.serves()
        (replica,) = stack.containers("service")
        if cause == "kill":
            replica.kill()
        else:
            pool.submit(client.post, f"/{cause}")
        seconds = wait_until(lambda: replica.inspect("RestartCount") and stack.serves())
    print(f"{cause}: the only replica serves again after {seconds:.1f} s")


@pytest.mark.parametrize(("method", "statuses", "times"), [("GET", [200, 200], 3), ("POST", [200, 502], 2)])
def test_compose_repeats_a_request_that_a_replica_died_of_unless_it_may_have_had_its_effect(
    method, statuses, times, image, variant, tmp_path
):
    """Of two requests, one for each replica, one kills its replica."""
    with Stack(tmp_path, image, variant(FATAL)).up() as stack, stack.client() as client:
        path = f"/die/{stack.containers('service')[0].id[:12]}"
        assert sorted(client.request(method, path).status_code for _ in range(2)) == statuses
        assert stack.compose("logs", "service").count(f"{method} has begun") == times


WATCH = ["docker", "compose", "--file", "deploy/watch.yaml"]


def test_watch_serves_an_edit_even_after_one_that_cannot_start_and_builds_a_changed_lock_anew(image, tmp_path):
    for name in ("Dockerfile", "requirements.txt", ".dockerignore"):
        shutil.copy2(HERE / name, tmp_path)
    shutil.copy2(frozen(), tmp_path)
    shutil.copytree(HERE / "deploy", tmp_path / "deploy", symlinks=True)
    port, name, lock = str(free_port()), f"{NAME}-watch", tmp_path / "requirements.txt"
    environment = os.environ | {"NAME": name, "IMAGE": name, "PORT": port}
    url = f"http://127.0.0.1:{port}"

    def built() -> str:
        """The image that runs, or nothing while one container takes another's place."""
        ids = run("docker", "ps", "--quiet", f"--filter=name={name}-watch-service").split()
        return Container("docker", ids[0]).inspect("Image") if ids else ""

    def served() -> bool:
        return answers(url, "/openapi.json", "Read the item")

    def logs() -> str:
        return run(*WATCH, "logs", cwd=tmp_path, env=environment)

    with subprocess.Popen([*WATCH, "up", "--build", "--watch"], cwd=tmp_path, env=environment) as watch:
        try:
            wait_until(lambda: answers(url), 120)
            first = built()
            edited = tmp_path / "main.py"
            text = edited.read_text()
            edited.write_text("import nonsense\n" + text)
            wait_until(lambda: "No module named 'nonsense'" in logs())
            edited.write_text(text.replace("Read an item", "Read the item"))
            seconds = wait_until(served)
            print(f"an edit of main.py is served after {seconds:.1f} s")
            assert built() == first
            lock.write_text(lock.read_text() + "# changed\n")
            wait_until(lambda: built() not in {"", first} and served(), 300)
        finally:
            watch.terminate()
            run(*WATCH, "down", "--rmi", "all", "--timeout", "0", cwd=tmp_path, env=environment)
