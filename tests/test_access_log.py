"""What the access log promises: one line a request, which says what happened and of which trace it is."""

import json
import socket
from urllib.parse import urlsplit

import httpx
import pytest

from tests.harness import TRACEPARENT, Process


def access(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "http.request.method" in line]


def test_access_line_says_what_happened(service):
    start = service.mark()
    httpx.get(service.url + "/items/5?q=secret")
    httpx.head(service.url + "/")
    httpx.get(service.url + "/nothing")
    get, head, missing = access(service.since(start))
    assert get.pop("timestamp")
    assert get.pop("http.server.request.duration") > 0
    assert get == {
        "level": "info",
        "logger": "access",
        "message": "GET /items/5 200",
        "http.request.method": "GET",
        "url.scheme": "http",
        "url.path": "/items/5",
        "http.route": "/items/{item_id}",
        "http.response.status_code": 200,
        "http.response.body.size": len('{"item_id":5,"q":"secret"}'),
        "client.address": "127.0.0.1",
    }
    assert (head["http.request.method"], head["http.response.body.size"]) == ("HEAD", 0)
    assert missing["http.route"] is None


def test_access_line_is_one_a_request_and_none_for_a_probe_that_succeeds(service):
    start = service.mark()
    with httpx.Client(base_url=service.url) as client:
        for path in ("/livez", "/readyz", "/", "/livez", "/", "/last"):
            client.get(path)
    assert [line["url.path"] for line in access(service.since(start))] == ["/", "/", "/last"]


LEVELS = """
@app.get("/levels")
async def levels() -> None:
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger("shop"), level)("said at %s", level)
"""


@pytest.mark.parametrize(
    ("switches", "levels"),
    [(("--log-level=debug", "--no-access-log"), ["debug", "info", "warning"]), (("--log-level=warning",), ["warning"])],
)
def test_log_level_holds_for_every_logger_and_either_switch_ends_the_access_log(variant, switches, levels):
    with Process(*switches, source=variant(LEVELS), DRAIN_SECONDS="0") as process:
        httpx.get(process.url + "/levels")
        process.terminate()
    assert [line["level"] for line in process.said("said at")] == levels
    assert not access(process.lines)


@pytest.mark.parametrize(("switches", "requests"), [((), 1), (("--no-access-log",), 0)])
def test_switch_ends_the_access_log_that_a_configuration_of_yours_writes(tmp_path, switches, requests):
    """To a file, with each record's logger on a line of its own."""
    handler = {"class": "logging.FileHandler", "filename": str(tmp_path / "log"), "formatter": "name"}
    config = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"name": {"format": "%(name)s"}},
        "handlers": {"file": handler},
        "root": {"handlers": ["file"], "level": "INFO"},
    }
    (file := tmp_path / "log.json").write_text(json.dumps(config))
    with Process(f"--log-config={file}", *switches, DRAIN_SECONDS="0") as process:
        httpx.get(process.url)
        process.terminate()
    assert (tmp_path / "log").read_text().splitlines().count("access") == requests


@pytest.mark.parametrize(
    ("header", "ids"),
    [
        (TRACEPARENT, tuple(TRACEPARENT.split("-")[1:3])),
        ("00-" + "0" * 32 + "-b7ad6b7169203331-01", (None, None)),
        ("ff" + TRACEPARENT[2:], (None, None)),
        ("nonsense", (None, None)),
        (f"{TRACEPARENT}, {TRACEPARENT}", (None, None)),
        ("", (None, None)),
    ],
)
def test_trace_ids_come_from_a_valid_traceparent_alone(service, header, ids):
    start = service.mark()
    with httpx.Client(base_url=service.url) as client:
        client.get("/", headers=[("traceparent", value) for value in header.split(", ")])
        client.get("/after")  # on the same connection, without the header
    first, second = access(service.since(start))
    assert (first.get("trace_id"), first.get("span_id")) == ids
    assert "trace_id" not in second


def test_trace_ids_do_not_leak_to_the_next_request_in_a_pipeline(service):
    start = service.mark()
    with socket.create_connection(("127.0.0.1", urlsplit(service.url).port)) as connection:
        first = f"GET / HTTP/1.1\r\nHost: a\r\ntraceparent: {TRACEPARENT}\r\n\r\n"
        connection.sendall(first.encode() + b"GET /pipelined HTTP/1.1\r\nHost: a\r\n\r\n")
        service.wait_for("GET /pipelined")
    assert ["trace_id" in line for line in access(service.since(start))] == [True, False]


def test_path_forges_no_line(service):
    httpx.get(service.url + "/%0A%7B%22level%22%3A%22critical%22%7D%0D%1B[31m%E2%80%A8")
    line = service.wait_for("critical")
    assert line["level"] == "info"
    assert line["url.path"] == '/\n{"level":"critical"}\r\x1b[31m\u2028'
