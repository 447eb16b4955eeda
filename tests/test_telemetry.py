"""What leaves over OTLP, each by a test: built with fastapi[opentelemetry], received by VictoriaMetrics and by a decoder."""

import base64
import time
from types import SimpleNamespace

import httpx
import pytest

from tests import harness
from tests.harness import (
    HERE,
    PYTHONS,
    TRACEPARENT,
    Image,
    Process,
    answers,
    copy_project,
    run,
    wait_until,
    write_variant,
)

NAME = f"{harness.NAME}-telemetry"
SWITCH = "--env=FASTAPI_OTEL_AUTO_CONFIGURE=true"
OPERATION = "GET /items/{item_id}"
COUNT = 20

# In the image itself, since what encodes the requests there decodes them as well.
RECEIVER = """
import http.server, json
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

REQUESTS = {"/v1/traces": ExportTraceServiceRequest, "/v1/logs": ExportLogsServiceRequest}

class Receiver(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        print(json.dumps(MessageToDict(REQUESTS[self.path].FromString(body))), flush=True)
        self.do_GET()

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("", 80), Receiver).serve_forever()
"""

DATABASE = f"""
FROM python:{PYTHONS[0]}-slim
RUN apt-get update && apt-get install --yes --no-install-recommends victoria-metrics
ENTRYPOINT ["victoria-metrics", "-httpListenAddr=:80", "-storageDataPath=/tmp", \
    "-opentelemetry.usePrometheusNaming", "-search.latencyOffset=0s"]
"""


@pytest.fixture(scope="module")
def image(engine, tmp_path_factory) -> Image:
    """As somebody builds it who follows the README."""
    directory = tmp_path_factory.mktemp("telemetry")
    copy_project(directory)
    source = write_variant(directory / "main.py")
    source.write_text(source.read_text().replace('"fastapi",', '"fastapi[opentelemetry]",'))
    run("make", "lock", "build", f"ENGINE={engine}", f"IMAGE={NAME}", cwd=directory)
    return Image(engine, PYTHONS[0], NAME)


@pytest.fixture(scope="module")
def receiver(image):
    with image.container("-c", RECEIVER, flags=("--entrypoint=python",)) as container:
        yield container


@pytest.fixture(scope="module")
def database(engine):
    """A database of metrics, which takes OTLP and is asked as Prometheus is."""
    name = f"{NAME}-database"
    run(engine, "build", "--tag", name, "-", input=DATABASE)
    with Image(engine, PYTHONS[0], name).container(flags=("--tmpfs=/tmp",), ready=False) as container:
        wait_until(lambda: answers(container.url, "/health"))
        yield container


def items(requests: list[dict], service: str, resources: str, scopes: str, records: str) -> list[dict]:
    """The spans or log records of this service, their attributes and ids as the log's lines have them."""
    found = []
    for resource in (resource for request in requests for resource in request.get(resources, [])):
        if attributes(resource["resource"])["service.name"] == service:
            found += [record for scope in resource[scopes] for record in scope[records]]
    ids = ("traceId", "spanId", "parentSpanId")
    return [
        record
        | {"attributes": attributes(record)}
        | {name: base64.b64decode(record[name]).hex() for name in ids if name in record}
        for record in found
    ]


def attributes(record: dict) -> dict[str, str]:
    return {item["key"]: str(*item["value"].values()) for item in record.get("attributes", [])}


@pytest.fixture(scope="module", params=[1, 2])
def told(request, image, receiver, database):
    """What arrived from a service of so many processes that was stopped right after its last response."""
    service = f"items-{request.param}"
    flags = (
        *(SWITCH, f"--env=OTEL_SERVICE_NAME={service}", f"--env=OTEL_EXPORTER_OTLP_ENDPOINT=http://{receiver.address}"),
        f"--env=OTEL_EXPORTER_OTLP_METRICS_ENDPOINT=http://{database.address}/opentelemetry/v1/metrics",
        *("--env=DRAIN_SECONDS=0", "--memory=256m"),
    )
    with image.container("--workers", str(request.param), flags=flags) as container:
        wait_until(lambda: len(container.said("Application startup complete")) == request.param)
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{container.url}/half")
        for path in ("/livez", "/readyz", "/items/foo", "/broken", *["/items/5?q=x"] * (COUNT - 1)):
            httpx.get(container.url + path)
        httpx.get(f"{container.url}/items/5", headers={"traceparent": TRACEPARENT})
        status, _ = container.stop()
        lines = container.logs()
    requests = receiver.logs()
    spans = items(requests, service, "resourceSpans", "scopeSpans", "spans")
    return SimpleNamespace(
        processes=request.param,
        status=status,
        lines=lines,
        access=[line for line in lines if "http.request.method" in line],
        spans=spans,
        servers=[span for span in spans if span["kind"] == "SPAN_KIND_SERVER"],
        logs=items(requests, service, "resourceLogs", "scopeLogs", "logRecords"),
        metrics=counts(database.url, service),
    )


def counts(url: str, service: str) -> list[dict]:
    """The requests that were counted, a series for each process, route and status."""
    httpx.get(f"{url}/internal/force_flush")  # what has just come in is searched only then
    query = f'http_server_request_duration_seconds_count{{service_name="{service}"}}'
    answer = httpx.get(f"{url}/api/v1/query", params={"query": query, "time": time.time()}).json()
    return [series["metric"] | {"count": int(series["value"][1])} for series in answer["data"]["result"]]


def test_telemetry_of_every_request_arrives_although_the_stop_follows_the_last_at_once(told):
    assert told.status == 0
    ok = {"http.route": "/items/{item_id}", "http.response.status_code": "200"}
    assert sum(span["name"] == OPERATION and ok.items() <= span["attributes"].items() for span in told.servers) == COUNT
    names = {name.replace(".", "_"): value for name, value in ok.items()}
    counted = {line["service_instance_id"]: line["count"] for line in told.metrics if names.items() <= line.items()}
    assert (sum(counted.values()), len(counted) <= told.processes) == (COUNT, True)


def test_telemetry_has_the_ids_of_the_access_lines(told):
    ids = {(span["traceId"], span["spanId"]): span["attributes"]["url.path"] for span in told.servers}
    assert len(ids) == COUNT + 3
    assert ids == {(line["trace_id"], line["span_id"]): line["url.path"] for line in told.access}


def test_telemetry_continues_the_trace_of_the_caller(told):
    _, trace, parent, _ = TRACEPARENT.split("-")
    assert [span["traceId"] for span in told.servers if span.get("parentSpanId") == parent] == [trace]


def test_telemetry_leaves_the_probes_out(told):
    routes = {"/broken", "/half", "/items/{item_id}"}
    assert {span["attributes"]["http.route"] for span in told.servers} == routes
    assert {series["http_route"] for series in told.metrics} == routes
    assert {span["traceId"] for span in told.spans} == {span["traceId"] for span in told.servers}


def test_telemetry_of_an_exception_is_a_failed_span_and_a_log_record_of_the_ids_in_the_log(told):
    failed = [span for span in told.servers if span["status"] == {"code": "STATUS_CODE_ERROR"}]
    assert sorted(span["name"] for span in failed) == ["GET /broken", "GET /half"]
    ids = {(span["traceId"], span["spanId"]) for span in failed}
    assert {(line["trace_id"], line["span_id"]) for line in told.lines if "exception.type" in line} == ids
    logs = [log for log in told.logs if log["eventName"] == "http.server.request.exception"]
    assert {(log["traceId"], log["spanId"]) for log in logs} == ids
    assert {log["attributes"]["exception.type"] for log in logs} == {"LookupError"}


def test_telemetry_of_a_request_that_does_not_validate_is_a_log_record(told):
    (span,) = [span for span in told.servers if span["attributes"]["http.response.status_code"] == "422"]
    (log,) = [log for log in told.logs if log["eventName"] == "fastapi.validation.failed"]
    assert (log["traceId"], log["attributes"]["http.route"]) == (span["traceId"], "/items/{item_id}")


def test_telemetry_without_a_receiver_stops_no_request_and_does_not_hold_the_stop(image):
    """By itself an export tries for 10 s: a shorter time is set."""
    endpoint = "--env=OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318"
    flags = (SWITCH, endpoint, "--env=OTEL_EXPORTER_OTLP_TIMEOUT=1", "--env=DRAIN_SECONDS=0", "--memory=128m")
    with image.container(flags=flags) as container:
        for _ in range(COUNT):
            assert httpx.get(f"{container.url}/items/5").status_code == 200
        code, _ = container.stop()
        levels = {line["level"] for line in container.logs() if "export" in line["message"]}
    assert code == 0
    assert set() < levels <= {"warning", "error"}


def test_telemetry_without_its_package_is_one_warning_that_names_it(variant):
    source = variant("""
@app.get("/loaded")
async def loaded() -> list[str]:
    return [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]
""")
    endpoint = "http://127.0.0.1:4318"
    with Process(source=source, FASTAPI_OTEL_AUTO_CONFIGURE="true", OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as process:
        assert httpx.get(process.url + "/loaded").json() == []
        line = process.wait_for("telemetry")
    assert (line["level"], "fastapi[opentelemetry]" in line["message"]) == ("warning", True)
    assert "opentelemetry-sdk" not in (HERE / "requirements.txt").read_text()
