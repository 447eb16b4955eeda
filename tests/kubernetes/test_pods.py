"""What pods promise beside their load: who reaches them, what they reach, what they say, how they end."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from tests.harness import run, wait_until
from tests.kubernetes.cluster import Copy, kubectl


def reaches(copy: Copy, host: str, port: int) -> bool:
    """Whether a replica can open this connection."""
    code = f"import socket; socket.create_connection(({host!r}, {port}), 3)"
    with suppress(AssertionError):
        copy.python(next(iter(copy.pods())), code)
        return True
    return False


def test_two_copies_of_different_names_serve_side_by_side(first, shop):
    for copy in (first, shop):
        with copy.client() as client:
            assert client.get("/items/5").json() == {"item_id": 5, "q": None}
        assert len(copy.pods()) == 2


def test_every_object_has_the_labels_that_kubernetes_recommends(first):
    kinds = "deployment,service,hpa,pdb,networkpolicy,ingress,configmap,secret,job,pod"
    ours = [item for item in first.get(kinds)["items"] if item["metadata"]["name"] != "kube-root-ca.crt"]
    assert len({item["kind"] for item in ours}) == len(kinds.split(","))
    for item in ours:
        labels = item["metadata"]["labels"]
        assert {f"app.kubernetes.io/{name}" for name in ("name", "version", "managed-by", "part-of")} <= labels.keys()
        assert labels["app.kubernetes.io/name"] == first.name


def test_steps_before_starting_have_run_once_for_all_replicas(first):
    (step,) = first.get("pods", f"--selector=job-name={first.name}-prestart")["items"]
    assert step["status"]["phase"] == "Succeeded"
    assert all("initContainers" not in pod["spec"] for pod in first.get("pods", first.replicas)["items"])


def test_clients_address_is_the_clients_whatever_it_claims(first):
    with first.client() as client:
        client.get("/items/101")
        client.get("/items/102", headers={"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "http"})
    wait_until(lambda: {"/items/101", "/items/102"} <= {line.get("url.path") for line in first.log()})
    plain, forged = (
        next(line for line in first.log() if line.get("url.path") == path) for path in ("/items/101", "/items/102")
    )
    assert forged["client.address"] == plain["client.address"]
    assert (plain["url.scheme"], forged["url.scheme"]) == ("https", "https")
    pods = kubectl("get", "pods", "--all-namespaces", "--output=jsonpath={.items[*].status.podIP}").split()
    assert plain["client.address"] not in pods, "that is the proxy's"


@pytest.fixture
def gateway(first):
    """The same deployment behind an HTTPRoute, of another host; its replicas are not touched."""
    with (
        first.edited("kustomization.yaml", "components/ingress", "components/gateway"),
        first.edited("kustomization.yaml", f"host={first.host}", "host=gateway.localhost"),
    ):
        first.deploy()
    yield first.url.replace(first.host, "gateway.localhost")
    first.kubectl("delete", "httproute", first.name)


def test_https_and_http_2_come_through_ingress_and_route(first, gateway):
    for url in (first.url, gateway):
        curl = ("curl", "--silent", "--insecure", "--retry", "5", "--retry-all-errors", "--fail", "--http2")
        said = run(*curl, "--output", "/dev/null", "--write-out", "%{http_version} %{http_code}", f"{url}/items/5")
        assert said == "2 200", url


def test_network_policy_lets_in_the_way_in_alone_and_out_names_and_telemetry(first, shop):
    pod = shop.get("pods", shop.replicas)["items"][0]["status"]["podIP"]
    assert not reaches(first, pod, 8000)
    assert not reaches(first, "kubernetes.default.svc.cluster.local", 443)
    assert reaches(first, "kube-dns.kube-system.svc.cluster.local", 53)
    listen = "import socket, time; s = [socket.create_server(('', port)) for port in (4318, 4319)]; time.sleep(600)"
    container = {
        "name": "listener",
        "image": shop.image,
        "command": ["python", "-c", listen],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    security = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    spec = {"containers": [container], "securityContext": security, "terminationGracePeriodSeconds": 0}
    listener = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "listener"}, "spec": spec}
    shop.kubectl("apply", "--filename=-", input=json.dumps(listener))
    shop.kubectl("wait", "--for=condition=Ready", "pod/listener", "--timeout=60s")
    address = shop.get("pod", "listener")["status"]["podIP"]
    wait_until(lambda: reaches(first, address, 4318))
    assert not reaches(first, address, 4319)
    shop.kubectl("delete", "pod", "listener")


def test_restricted_pod_security_is_in_force(shop):
    privileged = ("run", "root", f"--image={shop.image}", "--privileged", "--dry-run=server")
    with pytest.raises(AssertionError, match='violates PodSecurity "restricted'):
        shop.kubectl(*privileged)


def test_secret_is_a_file(shop):
    with shop.client() as client:
        assert client.get("/secret").json() == "postgresql://shop"


def test_log_is_json(first):
    assert {"level", "message", "timestamp"} <= first.log()[0].keys()


def test_debugger_of_the_cluster_samples_a_replica(first):
    pod = next(iter(first.pods()))
    sample = ["python", "-m", "profiling.sampling", "attach", "--duration", "2", "--pstats", "1"]
    first.kubectl(
        "debug", pod, f"--image={first.image}", "--target=service", "--profile=general", "--container=profiler",
        "--", *sample,
    )  # fmt: skip

    def sampled() -> bool:
        with suppress(AssertionError):  # until that container has started
            return "main.py" in first.kubectl("logs", pod, "--container=profiler")
        return False

    wait_until(sampled)


def test_debugger_of_the_cluster_stops_a_replica_and_lets_it_run_on(first):
    pod = next(iter(first.pods()))
    first.kubectl(
        "debug", "--stdin", pod, f"--image={first.image}", "--target=service", "--profile=general",
        "--env=TMPDIR=/proc/1/root/tmp", "--container=debugger", "--", "python", "-m", "pdb", "-p", "1",
        input="p 'the sum is', 6 * 7\nq\n",
    )  # fmt: skip
    wait_until(lambda: "('the sum is', 42)" in first.kubectl("logs", pod, "--container=debugger"))
    code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8000/readyz').status)"
    assert first.python(pod, code) == "200"


def test_pod_stops_by_itself_within_its_grace(shop):
    pod = next(iter(shop.pods()))
    status = "{.status.containerStatuses[0].state.terminated.exitCode}"
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(shop.kubectl, "wait", f"pod/{pod}", f"--for=jsonpath={status}=0", "--timeout=60s")
        shop.kubectl("delete", "pod", pod)
    ended.result()  # which fails for one that is killed: it ends with 137, and then it is gone
