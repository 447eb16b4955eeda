"""What deploy/kubernetes promises without a cluster: schemas, one place for each value, the pod as Podman plays it."""

import json
import math
import re
import shutil
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

import main
from tests.harness import (
    HERE,
    NAME,
    UV,
    Container,
    Image,
    answers,
    engine_answers,
    found,
    free_port,
    missing,
    run,
    wait_until,
)
from tests.kubernetes.cluster import Copy

pytestmark = pytest.mark.check
VALIDATOR = "kubernetes-validate@1.37.0"  # of the Kubernetes whose schemas it brings
CONTAINER = Container("podman", f"{NAME}-pod-service")


def copied(folder: Path, *components: str) -> Copy:
    """A user's copy, whose manifests can be rendered without a cluster."""
    if not shutil.which("kubectl"):
        missing("kubectl renders the manifests: install it")
    return Copy(folder / "clone", "default", "", NAME, "\n  - components/".join(components))


def read(manifest: str) -> list[dict]:
    """Its documents, read with the YAML library of the validator."""
    code = "import json, sys, yaml; print(json.dumps([*yaml.safe_load_all(sys.stdin)]))"
    return json.loads(run(UV, "tool", "run", "--from", VALIDATOR, "python", "-c", code, input=manifest))


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> str:
    return copied(tmp_path_factory.mktemp("copy"), "ingress", "prestart").render()


@pytest.fixture(scope="session")
def documents(manifest) -> dict[str, dict]:
    return {document["kind"]: document.get("spec", {}) for document in read(manifest)}


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
    if not engine_answers("podman"):
        missing("Podman plays the manifest, and does not answer: install it")
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


def spread(pod: dict) -> list[dict]:
    """The selectors by which its replicas are kept apart."""
    zones = pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    return [
        rule["labelSelector"] for rule in (*pod["topologySpreadConstraints"], *(z["podAffinityTerm"] for z in zones))
    ]


# --- The manifest ---


def test_manifests_are_valid_in_the_newest_kubernetes(manifest, tmp_path):
    path = tmp_path / "manifest.yaml"
    path.write_text(manifest)
    run(UV, "tool", "run", VALIDATOR, "--strict", path)


def test_manifests_refer_to_nothing_that_they_lack(documents, service, environment):
    labels = documents["Deployment"]["template"]["metadata"]["labels"]
    selectors = [
        documents["Deployment"]["selector"]["matchLabels"],
        documents["Service"]["selector"],
        documents["PodDisruptionBudget"]["selector"]["matchLabels"],
        documents["NetworkPolicy"]["podSelector"]["matchLabels"],
        *(selector["matchLabels"] for selector in spread(documents["Deployment"]["template"]["spec"])),
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert documents["HorizontalPodAutoscaler"]["scaleTargetRef"]["name"] == NAME
    (rule,) = documents["Ingress"]["rules"]
    assert rule["http"]["paths"][0]["backend"]["service"] == {"name": NAME, "port": {"name": "http"}}
    assert service["ports"] == [{"name": "http", "containerPort": int(environment["PORT"])}]
    assert service["image"].endswith(f":{main.app.version}")
    assert labels["app.kubernetes.io/version"] == main.app.version


@pytest.mark.parametrize("components", [("ingress",), ("gateway", "otlp"), ("traefik", "scrape")])
def test_copy_has_nothing_of_what_it_has_changed(tmp_path, components):
    copy = copied(tmp_path, *components, "prestart")
    copy.edit("kustomization.yaml", "registry.example.com/fastapi-container", "registry.example.org/shop")
    copy.edit("kustomization.yaml", "newTag: 1.0.0", "newTag: 2.3.4")
    copy.edit("kustomization.yaml", "version=1.0.0", "version=2.3.4")
    copy.edit("kustomization.yaml", "namespace: default", "namespace: elsewhere")
    copy.edit("kustomization.yaml", "controller=traefik", "controller=the-way-in")
    copy.edit("kustomization.yaml", "minReplicas=2", "minReplicas=3")
    copy.edit("kustomization.yaml", "maxReplicas=10", "maxReplicas=33")
    copy.edit("settings.env", "HELLO=World", "HELLO=Moon")
    text = copy.render()
    for old in ("fastapi-container", "example.com", "1.0.0", "World", "namespace: default", "controller", ": app\n"):
        assert old not in text, old
    documents = read(text)
    assert {document["metadata"]["namespace"] for document in documents} == {"elsewhere"}
    assert copy.host in text
    (autoscaler,) = (document["spec"] for document in documents if document["kind"] == "HorizontalPodAutoscaler")
    assert (autoscaler["minReplicas"], autoscaler["maxReplicas"]) == (3, 33)
    assert "HELLO: Moon" in text


def test_changed_setting_and_changed_secret_are_other_pods(tmp_path):
    copy = copied(tmp_path, "ingress")
    renderings = [copy.render()]
    copy.set("LOG_LEVEL=debug")
    renderings.append(copy.render())
    copy.edit("kustomization.yaml", "files: []", "files: [secrets/database_url]")
    for secret in ("postgresql://a", "postgresql://b"):
        (copy.folder / "deploy/secrets/database_url").write_text(secret)
        renderings.append(copy.render())
    pods = [next(d["spec"]["template"] for d in read(text) if d["kind"] == "Deployment") for text in renderings]
    assert all(before != after for before, after in pairwise(pods))


def test_settings_are_in_one_place():
    assert (HERE / "deploy/settings.env").samefile(HERE / "deploy/kubernetes/settings.env")
    assert (HERE / "deploy/secrets").samefile(HERE / "deploy/kubernetes/secrets")


def test_table_of_replicas_follows_from_what_a_core_served_and_what_the_autoscaler_holds(documents, service):
    asked = int(service["resources"]["requests"]["cpu"].removesuffix("m")) / 1000
    (metric,) = documents["HorizontalPodAutoscaler"]["metrics"]
    used = asked * metric["resource"]["target"]["averageUtilization"] / 100

    def replicas(requests: int, rate: float) -> int:
        return math.ceil(requests / (rate * used)) + 1

    text = (HERE / "docs/deployments.md").read_text()
    (seen,) = re.findall(r"or ([\d,]+) for a core", text)
    rate = int(seen.replace(",", ""))
    rows = re.findall(r"^\| ([\d,]+) \| (\d+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert rows == [
        (f"{requests:,}", str(replicas(requests, rate)), f"{replicas(requests, rate) * asked:g}")
        for requests in (1000, 10_000, 100_000)
    ]
    figures = json.loads((HERE / "bench/results.json").read_text())["figures"]
    found = figures["requests per CPU second, /items/5?q=somequery, 64 connections"]["this project"]
    rate = round(statistics.median(found), -3)
    assert f"about {rate:,.0f} for a core, by which {replicas(100_000, rate)} replicas" in text.replace("\n", " ")


# --- The pod ---


def test_pod_serves_as_nobody_after_its_steps_before_starting(play, pod, service):
    since = time.time()
    with play() as url:
        assert kubelet(service["startupProbe"], url)
        httpx.get(url, headers={"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"})
        (line,) = found(lambda: [line for line in CONTAINER.logs() if "client.address" in line])
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
    since, change = time.time(), ("HELLO: World", "LOG_LEVEL: loud")
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
