"""What Prometheus knows of a service that no line was added to, each by a question from docs/deployments.md."""

import itertools
import json
import os
import re
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from tests.compose import Stack
from tests.harness import (
    HERE,
    NAME,
    PYTHONS,
    Container,
    Image,
    answers,
    free_port,
    missing,
    run,
    wait_until,
    write_variant,
)

WINDOW = 15  # seconds, in the place of the documents' minute
QUERIES = re.search(r"```promql\n(.*?)```", (HERE / "docs/deployments.md").read_text(), re.DOTALL)
RATE, ERRORS, SLOWEST, IN_FLIGHT = QUERIES[1].splitlines() if QUERIES else []
ALERTS = re.findall(r"alert: (\w+)\n +expr:(.*?)\n +for:", (HERE / "deploy/metrics/alerts.yaml").read_text(), re.DOTALL)
ROUTES = {"/broken": "/broken", "/slow": "/slow", "/items/{item_id}": "/items/5"}
BOUNDS = (0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)  # of the buckets from which quantiles come

SERVICE = """
import asyncio
@app.get("/slow")
async def slow() -> None:
    await asyncio.sleep(0.3)
@app.get("/hold")
async def hold() -> None:
    await asyncio.sleep(30)
"""

PROMETHEUS = f"""
FROM python:{PYTHONS[0]}-slim
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus && install -d -o 65534 /prometheus
USER 65534
ENTRYPOINT ["prometheus"]
"""

# For OTLP, since Debian builds Prometheus without its receiver: this one is asked as Prometheus is, but knows no
# target_info. Where PROMETHEUS names an image with the receiver, that is tested in its place.
RECEIVER = os.environ.get("PROMETHEUS")
VICTORIA = f"""
FROM python:{PYTHONS[0]}-slim
RUN apt-get update && apt-get install --yes --no-install-recommends victoria-metrics && install -d -o 65534 /prometheus
USER 65534
ENTRYPOINT ["victoria-metrics", "-httpListenAddr=:9090", "-storageDataPath=/prometheus", \\
    "-opentelemetry.usePrometheusNaming", "-search.latencyOffset=0s"]
"""


class Steady(threading.Thread):
    """A client that sends ten requests again and again: one fails, one takes 0.3 s."""

    paths = ("/broken", "/slow", *["/items/5"] * 8)

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.over = url, False
        self.sent: list[tuple[float, str, float]] = []

    def run(self) -> None:
        with httpx.Client(base_url=self.url, verify=False, timeout=60) as client:
            for path in itertools.cycle(self.paths):
                if self.over:
                    return
                start = time.monotonic()
                client.get(path)
                self.sent.append((start, path, time.monotonic() - start))
                time.sleep(0.03)

    def seconds(self, path: str) -> list[float]:
        """How long the requests for this path took that lie within the window."""
        since = time.monotonic() - WINDOW
        return [seconds for start, each, seconds in self.sent if each == path and start > since]


class Told(Stack):
    """A stack with Prometheus, under a steady load."""

    def __init__(self, directory, image: str, source, way: str, **knobs: str) -> None:
        self.way, port = way, str(free_port())
        self.monitor = f"http://127.0.0.1:{port}"
        self.load: Steady
        super().__init__(directory, image, source, METRICS=way, PROMETHEUS_PORT=port, **knobs)
        for file in (f"{way}.env", f"{way}.yaml"):
            path = self.directory / "metrics" / file
            path.write_text(path.read_text().replace("5000", "1000").replace(": 5s", ": 1s"))

    def ask(self, query: str, window: int = WINDOW) -> dict[str, float]:
        """The values by their route, or by nothing where there is one for all."""
        asked = {"query": query.replace("[1m]", f"[{window}s]")}
        answer = httpx.get(f"{self.monitor}/api/v1/query", params=asked).json()
        return {each["metric"].get("http_route", ""): float(each["value"][1]) for each in answer["data"]["result"]}


@pytest.fixture(scope="module", params=["scrape", "otlp"])
def told(request, engine, tmp_path_factory):
    if engine != "docker":
        missing("Compose is Docker's")
    way, directory = request.param, tmp_path_factory.mktemp("metrics")
    source = write_variant(directory / "main.py", SERVICE)
    name, flags = f"{NAME}-{way}", ["--config.file=/metrics/prometheus.yaml", "--storage.tsdb.path=/prometheus"]
    if way == "otlp" and RECEIVER:
        name, flags = RECEIVER, [*flags, "--web.enable-otlp-receiver"]
    elif way == "otlp":
        run("docker", "build", "--quiet", "--tag", name, "-", input=VICTORIA)
        flags.clear()
    else:
        run("docker", "build", "--quiet", "--tag", name, "-", input=PROMETHEUS)
    stack = Told(directory, Image.build(engine).name, source, way, PROMETHEUS=name)
    stack.override("prometheus", f"command: !override {json.dumps(flags)}")
    if not flags:
        path = stack.directory / "metrics/otlp.env"
        path.write_text(path.read_text().replace("/api/v1/otlp/", "/opentelemetry/"))
    stack.load = load = Steady(stack.url)
    with stack.up():
        wait_until(stack.serves)
        load.start()
        yield stack
        load.over = True
        load.join()


def near(value: float, expected: float) -> bool:
    return abs(value - expected) < expected / 4


def test_metrics_tell_the_rate_of_each_route_as_its_client_counts_it(told):
    def agree() -> bool:
        rates = told.ask(RATE)
        counted = {route: len(told.load.seconds(path)) / WINDOW for route, path in ROUTES.items()}
        return set(rates) == set(counted) and all(near(rates[route], counted[route]) for route in counted)

    wait_until(agree)


def test_metrics_tell_the_share_of_errors(told):
    wait_until(lambda: near(told.ask(ERRORS).get("", 0), 0.1))


def test_metrics_tell_the_99th_percentile_of_each_route(told):
    def agree() -> bool:
        slowest, client = told.ask(SLOWEST), max(told.load.seconds("/slow"))
        bound = next(bound for bound in BOUNDS if bound >= client)
        return 0.25 <= slowest.get("/slow", 0) <= bound and slowest["/items/{item_id}"] < slowest["/slow"]

    wait_until(agree)


def test_metrics_tell_what_is_in_flight(told):
    def hold(_) -> None:
        with suppress(httpx.ReadTimeout):
            httpx.get(f"{told.url}/hold", verify=False, timeout=20)

    with ThreadPoolExecutor() as pool:
        held = pool.map(hold, range(3))
        wait_until(lambda: 3 <= told.ask(IN_FLIGHT).get("", 0) <= 4)
        list(held)
    wait_until(lambda: told.ask(IN_FLIGHT).get("", 9) <= 1)


def test_metrics_alert_of_errors_and_of_nothing_else(told):
    alerts = {name: query.strip("| \n") for name, query in ALERTS}
    assert list(alerts) == ["Errors", "Slow", "Crowded", "Gone"]
    if told.way == "otlp" and not RECEIVER:
        del alerts["Gone"]
    wait_until(lambda: [name for name, query in alerts.items() if told.ask(query)] == ["Errors"])


@pytest.mark.parametrize("told", ["scrape"], indirect=True)
def test_metrics_alert_when_no_replica_is_left(told):
    (group,) = httpx.get(f"{told.monitor}/api/v1/rules").json()["data"]["groups"]
    assert {rule["name"]: rule["health"] for rule in group["rules"]} == dict.fromkeys(dict(ALERTS), "ok")
    told.load.over = True
    told.compose("stop", "service")
    wait_until(lambda: told.ask(dict(ALERTS)["Gone"].strip()))


RECEIVER_OF_NOTHING = """
import http.server
class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer(("", 9090), Receiver).serve_forever()
"""
USED = """
(resident,) = [line.split()[1] for line in open("/proc/1/status") if line.startswith("VmRSS")]
print(resident, *open("/proc/1/stat").read().split()[13:15])
"""
REQUESTS = 2000
HERE_IT_GOES = "--env=OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=http://127.0.0.1:9090/v1/metrics"


def cost(image: Image, *flags: str) -> tuple[float, float, float]:
    """Of a container of this image: MB unpacked, MB resident after requests, microseconds of CPU for each."""
    receiver = ("-IS", "-c", RECEIVER_OF_NOTHING)
    with image.container(*receiver, flags=("--entrypoint=python",), ready=False) as beside:
        flags = (f"--network=container:{beside.id}", *image.flags, *flags)
        service = Container("docker", run("docker", "run", "--detach", *flags, image.name))
        try:
            wait_until(lambda: answers(beside.url))
            with httpx.Client(base_url=beside.url) as client:
                for _ in range(REQUESTS // 10):
                    client.get("/items/5")
                before = used(service)
                for _ in range(REQUESTS):
                    client.get("/items/5")
            resident, ticks = used(service)
            size = len(subprocess.run(["docker", "export", service.id], stdout=subprocess.PIPE, check=True).stdout)
        finally:
            run("docker", "rm", "--force", service.id)
    return size / 1e6, resident / 1000, (ticks - before[1]) * 1e4 / REQUESTS


def used(container: Container) -> tuple[int, int]:
    """Its first process's resident KB, and hundredths of a second of CPU."""
    resident, *ticks = map(int, run("docker", "exec", container.id, "python", "-IS", "-c", USED).split())
    return resident, sum(ticks)


def test_metrics_cost_at_most_15_mb_of_an_image_that_is_not_the_base(engine):
    if engine != "docker":
        missing("the ways are Compose's")
    image = Image.build(engine)
    name, folder = f"{image.name}-metrics", HERE / "deploy/metrics"
    run("docker", "build", "--quiet", f"--build-arg=IMAGE={image.name}", "--tag", name, folder)
    measured = Image(engine, image.python, name, *image.flags)
    costs = {"without": cost(image)}
    costs |= {way: cost(measured, f"--env-file={folder / way}.env", HERE_IT_GOES) for way in ("otlp", "scrape")}
    for way, figures in costs.items():
        print("{}: {:.1f} MB unpacked, {:.1f} MB resident, {:.0f} µs a request".format(way, *figures))
    assert costs["otlp"][0] - costs["without"][0] < 15
    packages = "import importlib.util as u; print([n for n in ('opentelemetry.sdk', 'prometheus_client') if found(n)])"
    assert image.python_says(f"found = lambda n: __import__('importlib.util').util.find_spec(n)\n{packages}") == "[]"
