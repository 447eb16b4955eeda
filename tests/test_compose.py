"""What deploy/compose.yaml promises, each by a test on a real engine: one proxy, several replicas, one machine."""

import asyncio
import re
import ssl
from pathlib import Path

import httpx
import pytest
import trustme

from tests.compose import Stack
from tests.harness import HERE, LIMITS, RATE, Clients, Load, found, free_port, make, run, wait_until

FORGED = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "http", "X-Real-Ip": "203.0.113.7"}
SETTING, SECRET = """it's "5 $HOME" # \\n""", "postgresql://user:password@database"


@pytest.fixture(scope="module", params=["", "/api"])
def stack(request, deployed, tmp_path_factory):
    stack = Stack(tmp_path_factory.mktemp("stack"), deployed, PREFIX=request.param)
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


def test_compose_starts_nothing_when_a_step_before_starting_fails_and_its_log_says_why(deployed, tmp_path):
    stack = Stack(tmp_path, deployed)
    (stack.directory / "settings.env").write_text("LOG_LEVEL=loud\n")
    try:
        with pytest.raises(AssertionError, match=r"LOG_LEVEL.*loud"):
            stack.update()
        states = [container.inspect("State.Status") for container in stack.containers("service", "proxy")]
    finally:
        stack.compose("down", "--volumes")
    assert states == ["created"] * 3


def test_compose_serves_the_host_that_it_is_told_and_asks_for_its_certificate(deployed, tmp_path):
    server = f"https://127.0.0.1:{free_port()}/directory"
    stack = Stack(tmp_path, deployed, HOST="example.org", EMAIL="me@example.org", ACME_SERVER=server)
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


def test_compose_serves_a_certificate_that_it_is_given_and_a_service_in_a_second_network(deployed, tmp_path):
    stack = Stack(tmp_path, deployed)
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
