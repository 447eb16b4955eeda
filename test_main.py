# /// script
# requires-python = ">=3.11"
# dependencies = ["pytest==9.2.0"]
# ///
"""What the service promises: its contract, its life as a process, its image and its container, each by a test.

`make test` runs all of it. `make smoke` runs the contract alone, which holds for any deployment, against URL.
"""

import asyncio
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import httpx
import pytest

import main

HERE = Path(__file__).parent
UV = Path(sys.executable).parent / "uv"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


# --- The contract, in-process or wherever URL says ---


class InProcess(httpx.BaseTransport):
    """httpx's ASGI transport for its synchronous client, with the app's lifespan around it."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.asgi = httpx.ASGITransport(main.service)
        self.lifespan = main.app.router.lifespan_context(main.app)
        self.runner.run(self.lifespan.__aenter__())

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def respond() -> httpx.Response:
            response = await self.asgi.handle_async_request(request)
            return httpx.Response(response.status_code, headers=response.headers, content=await response.aread())

        return self.runner.run(respond())

    def close(self) -> None:
        self.runner.run(self.lifespan.__aexit__(None, None, None))
        self.runner.close()


@pytest.fixture(scope="module")
def client():
    url = os.environ.get("URL")
    transport = None if url else InProcess()
    with httpx.Client(base_url=url or "http://in-process", transport=transport, timeout=10) as client:
        try:
            client.get("/livez")
        except (httpx.TransportError, httpx.UnsupportedProtocol) as error:
            pytest.exit(f"Nothing answers at {url} ({error}). `make run` starts the service; URL= names another.", 1)
        yield client


def test_contract_root_says_hello(client):
    response = client.get("/")
    assert (response.status_code, response.json()) == (200, {"Hello": "World"})


@pytest.mark.parametrize(
    ("path", "item"),
    [
        ("/items/5?q=somequery", {"item_id": 5, "q": "somequery"}),
        ("/items/5", {"item_id": 5, "q": None}),
        ("/items/-7?q=", {"item_id": -7, "q": ""}),
        ("/items/5?q=%C3%A9%20%26", {"item_id": 5, "q": "é &"}),
    ],
)
def test_contract_item_is_given_back(client, path, item):
    response = client.get(path)
    assert (response.status_code, response.json()) == (200, item)


def test_contract_item_id_is_a_number(client):
    response = client.get("/items/foo")
    (problem,) = response.json()["detail"]
    assert (response.status_code, problem["type"], problem["loc"]) == (422, "int_parsing", ["path", "item_id"])


def test_contract_unknown_path_and_method(client):
    assert (client.get("/nothing").status_code, client.get("/nothing").json()) == (404, {"detail": "Not Found"})
    assert (client.post("/items/5").status_code, client.post("/items/5").headers["allow"]) == (405, "GET")


@pytest.mark.parametrize("path", ["/", "/livez", "/readyz"])
def test_contract_head_is_answered_like_get_without_a_body(client, path):
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.headers["content-length"]) == (200, get.headers["content-length"])


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_contract_probes_succeed_and_are_never_cached(client, path):
    response = client.get(path)
    assert (response.status_code, response.headers["cache-control"]) == (200, "no-store")


def test_contract_every_operation_is_described(client):
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/", "/items/{item_id}"}
    for operations in schema["paths"].values():
        for operation in operations.values():
            assert operation["summary"]
            model = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
            assert all(field["examples"] for field in schema["components"]["schemas"][model]["properties"].values())


class Links(HTMLParser):
    """What a browser would load for a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found = set(re.findall(r"(?:url|Url): '([^']+)'", page))
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found |= {value for name, value in attrs if name in {"src", "href", "spec-url"}}


@pytest.mark.parametrize(("path", "parts"), [("/docs", 4), ("/redoc", 3)])
def test_contract_documentation_comes_whole_and_from_this_host_alone(client, path, parts):
    page = client.get(path)
    links = {urljoin(str(page.url), link) for link in Links(page.text).found}
    assert (page.status_code, len(links)) == (200, parts)
    for link in links:
        assert urlsplit(link)[:2] == (page.url.scheme, page.url.netloc.decode())
        assert client.get(link).status_code == 200


# --- The process: settings, logs, signals ---


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Process:
    """`python main.py` with these arguments and settings, whose output is read line by line as JSON."""

    def __init__(
        self,
        *arguments: str,
        command: tuple[str | Path, ...] = (sys.executable,),
        source: Path = HERE / "main.py",
        output: int = subprocess.PIPE,
        **environment: str,
    ) -> None:
        port = environment.setdefault("PORT", str(free_port()))
        self.url = f"http://127.0.0.1:{port}"
        clean = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "SSL_CERT_FILE"}}
        self.popen = subprocess.Popen(
            [*command, source, *arguments],
            env=clean | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[dict] = []
        self.news = threading.Condition()
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        for line in self.popen.stdout or ():
            with self.news:
                self.lines.append(json.loads(line))
                self.news.notify_all()

    def said(self, text: str) -> list[dict]:
        return [line for line in self.lines if text in line["message"]]

    def wait_for(self, text: str, count: int = 1) -> dict:
        """Wait until a message with this text has been logged so many times; the last of these lines."""
        with self.news:
            assert self.news.wait_for(lambda: len(self.said(text)) >= count, 20), (text, self.lines)
            return self.said(text)[-1]

    def access(self) -> list[dict]:
        return [line for line in self.lines if "http.request.method" in line]

    def __enter__(self):
        wait_until(lambda: self.popen.poll() is not None or answers(self.url), 60)
        assert self.popen.poll() is None, self.lines
        return self

    def __exit__(self, *_):
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.end()

    def end(self) -> int:
        """Wait for the end of the process; its exit status."""
        status = self.popen.wait(20)
        self.reader.join()
        if self.popen.stdout:
            self.popen.stdout.close()
        return status

    def terminate(self) -> int:
        self.popen.terminate()
        return self.end()


def answers(url: str, path: str = "/livez") -> bool:
    try:
        return httpx.get(url + path).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition, seconds: float) -> float:
    """Wait for a condition that nothing announces; how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - start


@pytest.fixture
def variant(tmp_path):
    """Somebody's own service: main.py with more code in it."""

    def write(code: str) -> Path:
        service, separator, running = (HERE / "main.py").read_text().partition("# --- Running it")
        path = tmp_path / "main.py"
        path.write_text(service + code + "\n\n" + separator + running)
        return path

    return write


def test_every_line_is_json_from_the_first_to_the_last(variant):
    source = variant("""
import warnings
print("a", "print", 1)
print("to stderr", file=sys.stderr)
warnings.warn("mind this")
logging.getLogger("shop").info("sold %d", 3, extra={"customer": "x"})
logging.getLogger("shop").info("%d", "a mistake in a log call")
logging.getLogger("shop").info("half a pair: \\ud83d")
threading.Thread(target=lambda: 1 / 0).start()
""")
    with Process(source=source, DRAIN_SECONDS="0") as process:
        httpx.get(process.url)
        assert process.terminate() == -signal.SIGTERM
    stamp = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00")  # RFC 3339, in UTC
    assert all(stamp.fullmatch(line["timestamp"]) and line["level"] and line["message"] for line in process.lines)
    assert process.said("a print 1")
    assert process.said("to stderr")
    assert process.said("mind this")[0]["level"] == "warning"
    assert process.said("sold 3")[0]["customer"] == "x"
    assert process.said("a mistake in a log call")
    assert process.said("half a pair: \\ud83d")
    assert process.said("ZeroDivisionError")
    assert process.lines[-1]["message"].startswith("Finished server process")


def test_error_at_start_is_one_line_with_its_traceback(variant):
    process = Process(source=variant("import nonsense"))
    assert process.end() == 1
    (line,) = process.lines
    assert (line["level"], line["exception.type"]) == ("critical", "ModuleNotFoundError")
    assert "import nonsense" in line["exception.stacktrace"]


def test_lifespan_error_ends_the_start(variant):
    source = (
        HERE.joinpath("main.py")
        .read_text()
        .replace("    with drain_on", '    raise OSError("no database")\n    with drain_on')
    )
    path = variant("")
    path.write_text(source)
    process = Process(source=path)
    assert process.end() == 3
    assert process.said("no database")


def test_terminal_gets_uvicorns_own_lines():
    keyboard, screen = pty.openpty()
    command = [sys.executable, HERE / "main.py", "--port", "0"]
    with subprocess.Popen(command, stdin=screen, stdout=screen, stderr=screen) as popen:
        os.close(screen)
        text = ""
        with open(keyboard, errors="replace", newline="") as lines:
            for line in lines:
                text += line
                if url := re.search(r"http://127\.0\.0\.1:\d+", line):
                    httpx.get(url[0] + "/livez")
                    httpx.get(url[0] + "/items/5")
                if "/items/5" in line:
                    break
        popen.kill()
    assert "\x1b[32mINFO\x1b[0m" in text
    assert '"\x1b[1mGET /items/5 HTTP/1.1\x1b[0m" \x1b[32m200 OK' in text
    assert "/livez" not in text
    assert "{" not in text


def test_access_line_says_what_happened():
    with Process() as process:
        httpx.get(process.url + "/items/5?q=secret")
        httpx.head(process.url + "/")
        httpx.get(process.url + "/nothing")
        process.wait_for("GET /nothing 404")
    get, head, missing = process.access()
    assert get.pop("timestamp")
    assert 0 < get.pop("http.server.request.duration") < 1
    assert get == {
        "level": "info",
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


def test_access_line_has_the_whole_template_of_an_included_route(variant):
    source = variant("""
from fastapi import APIRouter
router = APIRouter(prefix="/books")
@router.get("/{isbn}")
async def read_book(isbn: str) -> str:
    return isbn
app.include_router(router, prefix="/v1")
""")
    with Process(source=source) as process:
        httpx.get(process.url + "/v1/books/9")
        assert process.wait_for("GET /v1/books/9 200")["http.route"] == "/v1/books/{isbn}"


def test_access_line_is_one_a_request_and_none_for_a_probe_that_succeeds():
    with Process() as process, httpx.Client(base_url=process.url) as client:
        for path in ("/livez", "/readyz", "/", "/livez", "/", "/last"):
            client.get(path)
        process.wait_for("GET /last 404")
    assert [line["url.path"] for line in process.access()] == ["/", "/", "/last"]


@pytest.mark.parametrize("switch", ["--no-access-log", "--log-level=warning"])
def test_access_log_obeys_uvicorns_switches(switch):
    with Process(switch, DRAIN_SECONDS="0") as process:
        httpx.get(process.url)
        process.terminate()
    assert not process.access()


@pytest.mark.parametrize(
    ("header", "ids"),
    [
        (TRACEPARENT, tuple(TRACEPARENT.split("-")[1:3])),
        ("00-" + "0" * 32 + "-b7ad6b7169203331-01", (None, None)),
        ("ff" + TRACEPARENT[2:], (None, None)),
        ("nonsense", (None, None)),
        ("", (None, None)),
    ],
)
def test_trace_ids_come_from_a_valid_traceparent_alone(header, ids):
    with Process() as process, httpx.Client(base_url=process.url) as client:
        client.get("/", headers={"traceparent": header})
        client.get("/after")  # on the same connection, without the header
        process.wait_for("GET /after")
    first, second = process.access()
    assert (first.get("trace_id"), first.get("span_id")) == ids
    assert "trace_id" not in second


def test_path_forges_no_line():
    with Process() as process:
        httpx.get(process.url + "/%0A%7B%22level%22%3A%22critical%22%7D%0D%00%1B[31m%E2%80%A8%FF")
        line = process.wait_for("critical")
    assert line["level"] == "info"
    assert line["url.path"] == '/\n{"level":"critical"}\r\x00\x1b[31m\u2028\ufffd'


ACCESS_LINES = """
import json, logging.config, sys, timeit
import main
from uvicorn.config import LOGGING_CONFIG
from uvicorn.protocols.utils import get_client_addr, get_path_with_query_string

scope = {"type": "http", "http_version": "1.1", "scheme": "http", "method": "GET", "path": "/items/5"}
scope |= {"query_string": b"q=somequery", "client": ("127.0.0.1", 50000), "headers": []}
scope["route"] = next(route for route in main.app.routes if route.path == "/items/{item_id}")
logging.config.dictConfig(LOGGING_CONFIG)
logger = logging.getLogger("uvicorn.access")

def theirs():  # as in uvicorn's RequestResponseCycle.send
    address, path = get_client_addr(scope), get_path_with_query_string(scope)
    logger.info('%s - "%s %s HTTP/%s" %d', address, scope["method"], path, scope["http_version"], 200)

def ours():
    main.service.write(scope, 200, 30, 0.0)

main.service.enabled = True
print(json.dumps([min(timeit.repeat(f, number=1000, repeat=50)) * 1000 for f in (ours, theirs)]), file=sys.stderr)
"""


def test_access_line_costs_at_most_half_of_uvicorns_own():
    run = subprocess.run(
        [sys.executable, "-c", ACCESS_LINES], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=HERE, check=True
    )
    ours, theirs = json.loads(run.stderr)
    print(f"CPU time of an access line: {ours:.1f} µs, uvicorn's own {theirs:.1f} µs")
    assert ours <= theirs / 2


# --- Settings ---


@pytest.mark.parametrize(
    ("environment", "arguments", "names"),
    [
        ({"DRAIN_SECONDS": "abc"}, [], ["DRAIN_SECONDS=abc", "valid number"]),
        ({"DRAIN_SECONDS": "-1"}, [], ["DRAIN_SECONDS=-1", "greater than or equal to 0"]),
        ({"PORT": "99999"}, [], ["PORT=99999", "less than or equal to 65535"]),
        ({"LOG_LEVEL": "loud"}, [], ["LOG_LEVEL=loud", "'critical'", "'info'"]),
        ({"WEB_CONCURRENCY": "many"}, [], ["WEB_CONCURRENCY=many", "valid integer"]),
        ({"MAX_BODY_BYTES": "1.5"}, [], ["MAX_BODY_BYTES=1.5", "valid integer"]),
        ({"UVICORN_PORT": "tcp://10.0.0.1:80"}, [], ["--port", "'tcp://10.0.0.1:80'", "valid integer"]),
        ({}, ["--port", "99999"], ["PORT=99999", "less than or equal to 65535"]),
        ({}, ["--workers", "0"], ["WORKERS=0", "greater than or equal to 1"]),
        ({}, ["--log-level", "loud"], ["--log-level", "'loud'", "'info'"]),
        ({}, ["--prot", "80"], ["--prot", "--port"]),
        ({}, ["nonsense"], ["nonsense"]),
        ({}, ["--http", "nonsense"], ["nonsense"]),
    ],
)
def test_bad_setting_ends_with_one_sentence_that_names_it(environment, arguments, names):
    process = Process(*arguments, **environment)
    assert process.end() == 2
    (line,) = process.lines
    assert line["level"] == "critical"
    assert all(name in line["message"] for name in names), line
    assert "exception.stacktrace" not in line


@pytest.mark.parametrize("arguments", [[], ["--workers", "2"]])
def test_taken_port_ends_with_one_sentence_that_names_it(arguments):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        process = Process(*arguments, PORT=port)
        assert process.end() == 2
    (line,) = process.lines
    assert f"PORT={port}: Address already in use" in line["message"]


def test_command_line_wins_over_uvicorns_variable_and_that_over_ours():
    wanted, other = str(free_port()), str(free_port())
    for arguments, variable in ((["--port", wanted], other), ([], wanted)):
        process = Process(*arguments, UVICORN_PORT=variable, PORT=other, DRAIN_SECONDS="0")
        process.wait_for(f"Uvicorn running on http://127.0.0.1:{wanted} ")
        process.terminate()


def test_help_and_version_are_text():
    help_, version = (
        subprocess.run([sys.executable, HERE / "main.py", option], capture_output=True, text=True, check=True).stdout
        for option in ("--help", "--version")
    )
    assert help_.startswith("Usage: main.py [OPTIONS]")
    assert version.startswith("Running uvicorn")


def test_root_path_is_taken_off_and_shown_in_links():
    with Process("--root-path", "/api") as process:
        assert httpx.get(process.url + "/readyz").status_code == 200
        assert "url: '/api/openapi.json'" in httpx.get(process.url + "/docs").text


def test_uv_run_serves():
    with Process(command=(UV, "run", "--no-project", "--python", sys.executable)) as process:
        assert httpx.get(process.url + "/").json() == {"Hello": "World"}


def test_timeouts_fit_into_each_other():
    """A load balancer's idle time is 60 s by custom; Docker kills after 10 s."""
    defaults = main.Settings()
    assert defaults.timeout_keep_alive > 60
    assert defaults.drain_seconds + defaults.timeout_graceful_shutdown < 10 - 1


def test_lock_is_what_the_head_of_main_py_asks_for(tmp_path):
    lock = tmp_path / "requirements.txt"
    lock.write_text((HERE / "requirements.txt").read_text())
    subprocess.run(["make", "lock", f"LOCK={lock}"], check=True, cwd=HERE, stdout=subprocess.DEVNULL)
    assert lock.read_text() == (HERE / "requirements.txt").read_text(), "`make lock` brings them together"


# --- Errors ---


def test_exception_is_a_500_that_says_nothing_and_one_log_line_that_says_all(variant):
    source = variant("""
@app.get("/broken")
async def broken():
    raise LookupError("the secret inside")
""")
    with Process(source=source) as process, httpx.Client(base_url=process.url) as client:
        response = client.get("/broken", headers={"traceparent": TRACEPARENT})
        assert (response.status_code, response.json()) == (500, {"detail": "Internal Server Error"})
        connection = response.extensions["network_stream"]
        assert client.get("/").extensions["network_stream"].get_extra_info("client_addr") == connection.get_extra_info(
            "client_addr"
        )
        (line,) = [line for line in process.lines if "exception.type" in line]
        assert process.wait_for("GET /broken 500")["trace_id"] == line["trace_id"] == TRACEPARENT.split("-")[1]
    assert (line["level"], line["exception.type"]) == ("error", "LookupError")
    assert 'raise LookupError("the secret inside")' in line["exception.stacktrace"]


def test_response_that_breaks_off_closes_the_connection(variant):
    source = variant("""
from fastapi.responses import StreamingResponse
@app.get("/half")
async def half():
    async def chunks():
        yield b"half"
        raise LookupError
    return StreamingResponse(chunks())
""")
    with Process(source=source) as process:
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(process.url + "/half")
        process.wait_for("Exception in ASGI application")
        assert process.wait_for("GET /half 200")["http.response.body.size"] == 4
        assert answers(process.url)


def test_body_over_the_limit_is_a_413(variant):
    source = (
        variant("""
from fastapi import Body
@app.post("/size")
async def size(body: Annotated[bytes, Body()]) -> int:
    return len(body)
""").parent
        / "main.py"
    )
    source.write_text(source.read_text().replace("from typing import Any", "from typing import Annotated, Any"))
    with Process(source=source, MAX_BODY_BYTES="1000") as process:
        post = f"{process.url}/size"
        assert httpx.post(post, content=b"x" * 1000).json() == 1000
        assert httpx.post(post, content=b"x" * 1001).status_code == 413
        assert httpx.post(post, content=iter([b"x" * 600] * 2)).status_code == 413  # chunked, no length announced


# --- The end ---


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sigterm_makes_unready_at_once_but_serves_through_the_drain(workers):
    with Process("--workers", workers, DRAIN_SECONDS="2") as process, httpx.Client(base_url=process.url) as open_one:
        process.wait_for("Application startup complete", int(workers))
        open_one.get("/")
        process.popen.terminate()
        wait_until(lambda: httpx.get(process.url + "/readyz").status_code == 503, 1)
        start = time.monotonic()
        assert httpx.get(process.url + "/livez").status_code == 200
        last = open_one.get("/")
        assert (last.status_code, last.headers["connection"]) == (200, "close")
        assert httpx.get(process.url + "/").status_code == 200
        process.end()
        assert 1 < time.monotonic() - start < 4
    assert len(process.said("Shutting down in 2 s")) == int(workers)
    assert len(process.said("Finished server process")) == int(workers)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_second_sigterm_ends_the_drain(workers):
    with Process("--workers", workers, DRAIN_SECONDS="60") as process:
        process.wait_for("Application startup complete", int(workers))
        process.popen.terminate()
        process.wait_for("Shutting down in 60 s", int(workers))
        process.popen.terminate()
        process.end()
    assert len(process.said("Finished server process")) == int(workers)


def test_interrupt_from_the_keyboard_does_not_drain():
    with Process(DRAIN_SECONDS="60") as process:
        process.popen.send_signal(signal.SIGINT)
        process.end()
    assert process.said("Finished server process")


SLOW = """
from fastapi.responses import StreamingResponse
@app.get("/slow")
async def slow() -> str:
    print("slow has begun")
    await asyncio.sleep(1)
    return "done"
@app.get("/stream")
async def stream():
    async def chunks():
        while True:
            yield b"tick"
            await asyncio.sleep(0.1)
    return StreamingResponse(chunks())
"""


def test_request_in_flight_at_sigterm_finishes(variant):
    with Process(source=variant(SLOW), DRAIN_SECONDS="0") as process, ThreadPoolExecutor() as pool:
        response = pool.submit(httpx.get, process.url + "/slow")
        process.wait_for("slow has begun")
        process.terminate()
        assert response.result().json() == "done"
    assert process.said("GET /slow 200")


def test_open_stream_cannot_hold_the_stop(variant):
    process = Process(source=variant(SLOW), DRAIN_SECONDS="0", UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN="1")
    with process, httpx.stream("GET", process.url + "/stream") as response:
        chunks = response.iter_raw()
        assert next(chunks) == b"tick"
        start = time.monotonic()
        process.terminate()
        assert 1 <= time.monotonic() - start < 3
    assert process.said("timeout graceful shutdown exceeded")


def test_reload_serves_the_change_and_does_not_drain(variant):
    source = variant("")
    with Process("--reload", "--reload-dir", str(source.parent), source=source) as process:
        source.write_text(source.read_text().replace('Hello="World"', 'Hello="again"'))
        wait_until(lambda: answers(process.url) and httpx.get(process.url).json() == {"Hello": "again"}, 20)
    assert process.said("Shutting down in 0 s")
