"""What kubernetes.yaml promises: schema, timeouts, and the pod that Podman makes of it, probed as a kubelet does."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import httpx
import pytest

import main
from tests.harness import HERE, NAME, UV, Container, Image, answers, free_port, missing, run, wait_until

pytestmark = [pytest.mark.check, pytest.mark.xdist_group("pods")]
MANIFEST = HERE / "deploy/kubernetes.yaml"
VALIDATOR = "kubernetes-validate@1.37.0"  # of the Kubernetes whose schemas it brings
CONTAINER = Container("podman", f"{NAME}-pod-{NAME}")


@pytest.fixture(scope="session")
def manifest() -> str:
    return MANIFEST.read_text().replace("fastapi-container", NAME)


@pytest.fixture(scope="session")
def documents(manifest) -> dict[str, dict]:
    """The manifest's documents by their kind, read with the YAML library of its validator."""
    code = "import json, sys, yaml; print(json.dumps([*yaml.safe_load_all(sys.stdin)]))"
    listed = json.loads(run(UV, "tool", "run", "--from", VALIDATOR, "python", "-c", code, input=manifest))
    return {document["kind"]: document["spec"] for document in listed}


@pytest.fixture(scope="session")
def pod(documents) -> dict:
    return documents["Deployment"]["template"]["spec"]


@pytest.fixture(scope="session")
def service(pod) -> dict:
    return pod["containers"][0]


@pytest.fixture(scope="session")
def environment(service) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in service["env"]}


@pytest.fixture(scope="session")
def built() -> Image:
    if not shutil.which("podman"):
        missing("Podman plays the manifest: install it")
    return Image.build("podman")


@pytest.fixture
def play(manifest, service, environment, built, variant):
    """The pod of the manifest, or of a change to it, with more code in its main.py; the URL where it is published."""

    @contextmanager
    def played(code: str = "", change: tuple[str, str] = ("", "")):
        run("podman", "tag", built.rebuilt(variant(code)).name, service["image"])
        port = free_port()
        publish = f"--publish=127.0.0.1:{port}:{environment['PORT']}"
        try:
            run("podman", "kube", "play", publish, "-", input=manifest.replace(*change))
            yield f"http://127.0.0.1:{port}"
        finally:
            run("podman", "pod", "rm", "--force", "--ignore", "--time=0", f"{NAME}-pod")

    return played


def kubelet(probe: dict, url: str) -> bool:
    """Ask as a kubelet does: True at the first success, False once the probe has failed as often as it may."""
    start = time.monotonic()
    for tick in range(probe["failureThreshold"]):
        time.sleep(max(0, start + tick * probe["periodSeconds"] - time.monotonic()))
        with suppress(httpx.TransportError):
            if httpx.get(url + probe["httpGet"]["path"], timeout=probe.get("timeoutSeconds", 1)).status_code < 400:
                return True
    return False


def said(text: str) -> bool:
    return any(text in line["message"] for line in CONTAINER.logs())


def events(since: float) -> list[str]:
    """What happened to containers, in this order."""
    columns = "{{.Name}} {{.Status}} {{.ContainerExitCode}}"
    return run("podman", "events", "--stream=false", f"--since={since}", f"--format={columns}").splitlines()


# --- The manifest ---


def test_manifest_is_valid_in_the_newest_kubernetes():
    run(UV, "tool", "run", VALIDATOR, "--strict", MANIFEST)


def test_manifest_refers_to_nothing_that_it_lacks(documents, service, environment):
    labels = documents["Deployment"]["template"]["metadata"]["labels"]
    assert documents["Deployment"]["selector"]["matchLabels"] == labels
    assert documents["Service"]["selector"] == labels
    assert documents["PodDisruptionBudget"]["selector"]["matchLabels"] == labels
    assert documents["NetworkPolicy"]["podSelector"]["matchLabels"] == labels
    assert documents["HorizontalPodAutoscaler"]["scaleTargetRef"]["name"] == NAME
    (rule,) = documents["Ingress"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"] == {"name": NAME, "port": {"name": "http"}}
    assert service["ports"] == [{"name": "http", "containerPort": int(environment["PORT"])}]
    assert service["image"].endswith(f":{main.app.version}")


# --- The pod ---


def test_pod_serves_as_nobody_after_its_steps_before_starting(play, pod, service):
    since = time.time()
    with play() as url:
        assert kubelet(service["startupProbe"], url)
        httpx.get(url, headers={"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"})
        (line,) = [line for line in CONTAINER.logs() if "client.address" in line]
        status = CONTAINER.python_says("print(open('/proc/1/status').read())")
        root = CONTAINER.python_says("import os; print(os.statvfs('/').f_flag & os.ST_RDONLY)")
        happened = events(since)
    assert (line["client.address"], line["url.scheme"]) == ("203.0.113.7", "https")
    facts = dict(line.split(":\t") for line in status.splitlines() if ":\t" in line)
    assert {facts[name] for name in ("Uid", "Gid")} == {"65532\t65532\t65532\t65532"}
    assert (int(facts["CapBnd"], 16), facts["NoNewPrivs"], root) == (0, "1", "1")
    unread = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}  # by Podman
    assert pod["securityContext"] == pod["securityContext"] | unread
    assert happened.index(f"{NAME}-pod-prestart died 0") < happened.index(f"{CONTAINER.id} start <nil>")


def test_pod_whose_steps_before_starting_fail_serves_nothing(play):
    since, change = time.time(), ('STOP_SECONDS, value: "20"', 'STOP_SECONDS, value: "15"')
    with pytest.raises(AssertionError, match="init container .* exited with code 1"), play(change=change):
        pass
    assert f"{CONTAINER.id} start <nil>" not in events(since)


# --- The probes ---


def test_startup_probe_waits_longer_than_the_liveness_probe_would(play, service):
    slow = """
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from fastapi import FastAPI
@asynccontextmanager
async def slow(app: FastAPI) -> AsyncGenerator[None]:
    await asyncio.sleep(15)
    yield
app.router.lifespan_context = slow
"""
    with play(slow) as url, ThreadPoolExecutor() as pool:
        alive = pool.submit(kubelet, service["livenessProbe"], url)
        assert kubelet(service["startupProbe"], url)
        assert not alive.result()


def test_liveness_probe_forgives_a_short_block_and_calls_for_the_restart_that_ends_a_long_one(play, service):
    blocks = """
import time
@app.get("/block/{seconds}")
async def block(seconds: int) -> None:
    print("blocked for", seconds)
    time.sleep(seconds)
"""
    probe = service["livenessProbe"]
    with play(blocks) as url, ThreadPoolExecutor() as pool:
        assert kubelet(service["startupProbe"], url)
        for block, alive in ((probe["periodSeconds"], True), (60, False)):
            blocked = pool.submit(httpx.get, f"{url}/block/{block}", timeout=60)
            wait_until(lambda text=f"blocked for {block}": said(text))
            assert kubelet(probe, url) is alive
        run("podman", "restart", f"--time={probe['terminationGracePeriodSeconds']}", CONTAINER.id)
        assert isinstance(blocked.exception(), httpx.TransportError)
        assert kubelet(service["startupProbe"], url)


def test_readiness_probe_alone_fails_while_a_pod_drains(play, manifest, service, environment):
    with play() as url, ThreadPoolExecutor() as pool:
        assert kubelet(service["startupProbe"], url)
        since = time.time()
        down = pool.submit(run, "podman", "kube", "down", "-", input=manifest)
        wait_until(lambda: not answers(url, "/readyz"))
        assert not kubelet(service["readinessProbe"], url)
        assert kubelet(service["livenessProbe"], url)
        down.result()
    assert time.time() - since > float(environment["DRAIN_SECONDS"])
    assert f"{CONTAINER.id} died 0" in events(since)
    assert not run("podman", "pod", "ps", "--quiet", f"--filter=name={NAME}")
