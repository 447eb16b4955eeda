"""A copy of this project, deployed to the cluster of CONTEXT, and what happens to its replicas and their nodes."""

import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

from tests.harness import HERE, run, wait_until
from tests.kubernetes.load import RATE, Load

CONTEXT = os.environ.get("CONTEXT", "")
HTTPS_PORT = os.environ.get("K8S_HTTPS_PORT", "8443")


def kubectl(*arguments: str, **options) -> str:
    return run("kubectl", "--context", CONTEXT, *arguments, **options)


def nodes() -> list[str]:
    return kubectl("get", "nodes", "--output=jsonpath={.items[*].metadata.name}").split()


def on_node(node: str, command: str, **options) -> str:
    return run("docker", "exec", "--interactive", node, "sh", "-c", command, **options)


def load_image(image: str) -> None:
    """Bring an image of the engine into every node, as `kind load` does."""

    def load(node: str) -> None:
        importing = f"docker exec --interactive {node} ctr --namespace k8s.io images import -"
        subprocess.run(f"docker save {image} | {importing}", shell=True, check=True, capture_output=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(load, nodes()))


@contextmanager
def away(node: str, verb: str):
    """A node that is dead (`kill`) or frozen (`pause`), until the end of the block."""
    routes = [route for route in on_node(node, "ip -4 route").splitlines() if " via " in route]
    run("docker", verb, node)
    try:
        yield
    finally:
        run("docker", {"kill": "start", "pause": "unpause"}[verb], node)
        for route in routes:  # to other nodes' pods, unless the cluster's network sets them again by itself
            on_node(node, f"ip route replace {route}")
        kubectl("wait", "--for=condition=Ready", f"node/{node}", "--timeout=120s")


class Copy:
    """What a user has made of a clone: Makefile, main.py and deploy/, with changes of the files that are his."""

    def __init__(self, folder: Path, namespace: str, image: str, name: str, component: str) -> None:
        self.folder, self.namespace, self.image, self.name = folder, namespace, image, name
        self.host = f"{name}.localhost"
        self.url = f"https://{self.host}:{HTTPS_PORT}"
        shutil.copytree(HERE / "deploy", folder / "deploy", symlinks=True)
        shutil.copy(HERE / "Makefile", folder)
        shutil.copy(HERE / "main.py", folder)
        self.edit("kustomization.yaml", "name=fastapi-container", f"name={name}")
        self.edit("kustomization.yaml", "host=api.example.com", f"host={self.host}")
        self.edit("kustomization.yaml", "components/ingress", f"components/{component}")
        # Half of the time to hear that a replica goes: what loses nothing by this loses nothing by all of it.
        self.edit("base/deployment.yaml", 'DRAIN_SECONDS, value: "10"', 'DRAIN_SECONDS, value: "5"')

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / "deploy/kubernetes" / file
        text = path.read_text()
        assert old in text, (file, old)
        path.write_text(text.replace(old, new))

    @contextmanager
    def edited(self, file: str, old: str, new: str):
        """This edit, until the end of the block."""
        path = self.folder / "deploy/kubernetes" / file
        text = path.read_text()
        self.edit(file, old, new)
        yield
        path.write_text(text)

    def set(self, setting: str) -> None:
        with (self.folder / "deploy/settings.env").open("a") as file:
            file.write(f"{setting}\n")

    def render(self) -> str:
        return run("kubectl", "kustomize", self.folder / "deploy/kubernetes")

    def make(self, target: str, image: str = "", context: str = CONTEXT) -> tuple[int, str]:
        """The exit status of make and all that it prints."""
        knobs = (f"CONTEXT={context}", f"NAMESPACE={self.namespace}", f"IMAGE={image or self.image}")
        command = ["make", "--no-print-directory", target, *knobs]
        result = subprocess.run(command, cwd=self.folder, text=True, capture_output=True, check=False)
        return result.returncode, result.stdout + result.stderr

    def deploy(self) -> str:
        status, said = self.make("deploy")
        assert status == 0, said
        return said

    def kubectl(self, *arguments: str, **options) -> str:
        return kubectl("--namespace", self.namespace, *arguments, **options)

    def get(self, *arguments: str) -> dict:
        return json.loads(self.kubectl("get", *arguments, "--output=json"))

    @property
    def deployment(self) -> str:
        return f"deployment/{self.name}"

    @property
    def replicas(self) -> str:
        """The selector of the pods that serve."""
        return f"--selector=app.kubernetes.io/name={self.name},app.kubernetes.io/component=service"

    def pods(self) -> dict[str, str]:
        """The replicas that are ready and not about to go, each with its node."""
        return {
            pod["metadata"]["name"]: pod["spec"]["nodeName"]
            for pod in self.get("pods", self.replicas)["items"]
            if "deletionTimestamp" not in pod["metadata"]
            and {"Ready": "True"}.items()
            <= {c["type"]: c["status"] for c in pod["status"].get("conditions", [])}.items()
        }

    def settle(self) -> None:
        """Wait until the rollout is over and what it has replaced is gone, so that nothing is left that could lose."""
        self.kubectl("rollout", "status", self.deployment, "--timeout=120s")
        wait_until(lambda: len(self.get("pods", self.replicas)["items"]) == len(self.pods()), 120)

    def spread(self) -> None:
        """One replica on each node, which scaling down or a node that was away has undone."""
        if len(set(self.pods().values())) < len(nodes()):
            self.kubectl("rollout", "restart", self.deployment)
        self.settle()

    def autoscale(self, **bounds: int) -> None:
        """Set the autoscaler's bounds, and let it take replicas back at once, not after the 300 s of its default."""
        spec = {"behavior": {"scaleDown": {"stabilizationWindowSeconds": 0}}, **bounds}
        self.kubectl("patch", "hpa", self.name, "--type=merge", f"--patch={json.dumps({'spec': spec})}")

    def restarts(self) -> dict[str, int]:
        """How often each replica has been restarted."""
        return {
            pod["metadata"]["name"]: sum(
                status["restartCount"] for status in pod["status"].get("containerStatuses", [])
            )
            for pod in self.get("pods", self.replicas)["items"]
        }

    def steadiest(self) -> str:
        """The replica with the fewest restarts, as Kubernetes takes its time with those that have had some."""
        restarts = self.restarts()
        return min(self.pods(), key=lambda pod: restarts[pod])

    def python(self, pod: str, code: str, **options) -> str:
        return self.kubectl("exec", pod, "--", "python", "-c", code, **options)

    def ask(self, pod: str, path: str) -> None:
        """Have this replica ask itself, and not wait for the answer."""
        ask = f"s.sendall(b'GET {path} HTTP/1.0\\r\\n\\r\\n'); time.sleep(1)"
        with suppress(AssertionError):  # as it is killed with the replica
            self.python(pod, f"import socket, time; s = socket.create_connection(('127.0.0.1', 8000)); {ask}")

    def log(self) -> list[dict]:
        """What the replicas have said; every line is JSON."""
        return [json.loads(line) for line in self.kubectl("logs", self.replicas, "--tail=-1").splitlines()]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"https://127.0.0.1:{HTTPS_PORT}", verify=False, headers={"Host": self.host})


@contextmanager
def served(copy: Copy, what: str, rate: float = RATE):
    """Load on this copy before, during and after what the block does to it, until that has settled."""
    with Load(copy.url, what, rate) as load:
        wait_until(lambda: len(load.requests) > rate)
        yield load
        copy.settle()
        enough = len(load.requests) + load.rate
        wait_until(lambda: len(load.requests) > enough)
    print(f"\n{load.report()}")
