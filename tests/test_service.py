"""What a user writes in the first part of main.py, and what his clients send, is as on a plain uvicorn."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import Request

from tests.harness import TRACEPARENT, Process, frozen, load, with_packages, write_variant


def ask(source: Path, path: str, **options) -> httpx.Response:
    """What the app of this main.py answers in this process, without a server."""
    transport = httpx.ASGITransport(load(source).app, **options)

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.get(path)

    return asyncio.run(get())


@pytest.mark.parametrize("what", ["Exception", "500"])
def test_own_handler_of_an_exception_answers_and_the_server_gets_it(variant, what):
    source = variant(f"""
from fastapi.responses import PlainTextResponse
@app.exception_handler({what})
async def own(request, error):
    return PlainTextResponse("mine", 500)
""")
    response = ask(source, "/broken", raise_app_exceptions=False)
    assert (response.status_code, response.text) == (500, "mine")
    with pytest.raises(LookupError):
        ask(source, "/broken")


# What needs packages that the lock does not hold.
EQUIPPED = """
import resource, tempfile
from pathlib import Path
from fastapi import UploadFile, WebSocket
from fastapi.templating import Jinja2Templates
@app.websocket("/socket")
async def echo(socket: WebSocket):
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(text)
templates = Jinja2Templates(Path(__file__).parent)
@app.get("/page")
async def page(request: Request):
    return templates.TemplateResponse(request, "page.html", {"number": 3})
@app.post("/upload")
async def upload(file: UploadFile) -> int:
    return len(await file.read())
@app.get("/room")
async def set_room(folder: str | None = None, size: int = resource.RLIM_INFINITY) -> None:
    tempfile.tempdir = folder
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
"""
HANDSHAKE = b"\r\n".join(
    [
        b"GET /socket HTTP/1.1",
        b"Host: service",
        b"Connection: Upgrade",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        b"\r\n",
    ]
)


@pytest.fixture(scope="module")
def equipped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("equipped")
    (folder / "page.html").write_text("{% for i in range(number) %}{{ i }}{% endfor %}")
    source = write_variant(folder / "main.py", EQUIPPED)
    command, environment = with_packages("jinja2", "python-multipart", "websockets")
    environment |= {"MAX_CONCURRENCY": "2", "MAX_WEBSOCKETS": "3", "MAX_BODY_BYTES": "5_000_000"}
    with Process(command=command, source=source, **environment) as process:
        yield process


def test_idle_websockets_have_a_limit_of_their_own(equipped):
    def open_socket() -> int:
        """The status that the handshake gets."""
        connection = sockets.enter_context(socket.create_connection(("127.0.0.1", urlsplit(equipped.url).port)))
        connection.sendall(HANDSHAKE)
        return int(connection.recv(65536).split()[1])

    with ExitStack() as sockets:
        assert [open_socket() for _ in range(4)] == [101, 101, 101, 503]
        assert [httpx.get(equipped.url).status_code for _ in range(3)] == [200] * 3


def test_template_is_rendered(equipped):
    response = httpx.get(equipped.url + "/page")
    assert (response.status_code, response.text) == (200, "012")


@pytest.mark.parametrize(
    ("room", "cause"), [({"folder": "/nonexistent"}, "FileNotFoundError"), ({"size": 1_500_000}, "OSError")]
)
def test_upload_that_finds_no_room_says_why_in_the_log(equipped, room, cause):
    def upload(size: int) -> httpx.Response:
        return httpx.post(equipped.url + "/upload", files={"file": bytes(size)}, timeout=20)

    start = equipped.mark()
    httpx.get(equipped.url + "/room", params=room)
    small, large = upload(10), upload(3_000_000)
    httpx.get(equipped.url + "/room")
    assert (small.status_code, small.text) == (200, "10")
    assert large.status_code in {400, 500}
    text = "POST /upload: " if large.status_code == 400 else "Exception in ASGI application"
    (line,) = [line for line in equipped.since(start) if text in line["message"]]
    assert line["exception.type"] == cause
    assert upload(3_000_000).status_code == 200


USUAL = """
import threading
from fastapi import APIRouter, Response
from fastapi.responses import StreamingResponse
from opentelemetry import baggage
app.state.ready = False
may_end = threading.Event()
@app.get("/slow")
def slow():
    print("slow has begun")
    may_end.wait()
@app.get("/end")
async def end() -> None:
    may_end.set()
@app.get("/late")
def late() -> int:
    from pydantic.v1 import BaseModel
    class Old(BaseModel):
        number: int
    return Old(number="3").number
@app.get("/caller")
async def caller() -> dict:
    carrier = {}
    propagate.inject(carrier)
    return {"carried": carrier, "customer": baggage.get_baggage("customer")}
v2 = FastAPI()
@v2.get("/things/{id}")
async def thing(id: int) -> int:
    return id
app.mount("/v2", v2)
tenants = FastAPI()
@tenants.get("/things/{id}")
async def thing_of_tenant(id: int) -> int:
    return id
app.mount("/tenants/{tenant}", tenants)
router = APIRouter(prefix="/shops/{shop}")
@router.get("/things/{id}")
async def thing_of_shop(shop: str, id: int) -> int:
    return id
app.include_router(router, prefix="/v3")
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Host
app.mount("/hosts", Starlette(routes=[Host("{name}", JSONResponse(3))]))
@app.get("/own-policy")
async def own_policy(response: Response) -> None:
    response.headers["Content-Security-Policy"] = "default-src https:"
@app.get("/until-gone")
async def until_gone(request: Request):
    async def tell():
        while not await request.is_disconnected():
            yield b"tick"
            await asyncio.sleep(0.05)
    return StreamingResponse(tell())
async def plain(scope, receive, send):
    await send({"type": "http.response.start", "status": 204})
    await send({"type": "http.response.body"})
app.mount("/plain", plain)
@app.post("/docs")
async def add_doc() -> int:
    return 3
@app.get("/files/{name}")
async def read_file(name: str) -> bytes:
    try:
        return open(f"/nonexistent/{name}", "rb").read()
    except OSError as error:
        raise fastapi.HTTPException(404) from error
@app.get("/reused")
async def reused():
    async def chunks():
        buffer = bytearray(10)
        for digit in b"0123456789":
            buffer[:] = bytes([digit]) * 10
            yield memoryview(buffer)
    return StreamingResponse(chunks(), headers={"Content-Length": "100"})
"""


@pytest.fixture(scope="module", params=["", "/api"], ids=["at the root", "below a prefix"])
def prefix(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def usual(prefix, tmp_path_factory):
    """A service that does what many do, below a prefix, too, which a proxy takes off."""
    source = write_variant(tmp_path_factory.mktemp("usual") / "main.py", USUAL)
    with Process("--root-path", prefix, source=source) as process:
        yield process


def test_500_waits_for_no_thread(usual):
    may_begin = len(usual.said("slow has begun"))
    with ThreadPoolExecutor(45) as pool:
        slow = [pool.submit(httpx.get, usual.url + "/slow", timeout=120) for _ in range(45)]
        usual.wait_for("slow has begun", may_begin + 40)  # as many threads as there are
        try:
            assert httpx.get(usual.url + "/broken", timeout=20).status_code == 500
        finally:
            httpx.get(usual.url + "/end", timeout=20)
        assert {response.result().status_code for response in slow} == {200}


def test_package_may_import_late(usual):
    assert httpx.get(usual.url + "/late").json() == 3


def test_what_the_caller_says_of_its_trace_reaches_the_app(usual):
    headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1", "baggage": "customer=x"}
    assert httpx.get(usual.url + "/caller", headers=headers).json() == {
        "carried": {"traceparent": TRACEPARENT, "tracestate": "vendor=1", "baggage": "customer=x"},
        "customer": "x",
    }
    assert httpx.get(usual.url + "/caller").json() == {"carried": {}, "customer": None}


@pytest.mark.parametrize("header", ["", f"traceparent: {TRACEPARENT}\r\n"])
def test_what_a_caller_hands_over_does_not_leak_to_the_next_request_in_a_pipeline(usual, header):
    with socket.create_connection(("127.0.0.1", urlsplit(usual.url).port)) as connection:
        first = f"GET /caller HTTP/1.1\r\nHost: a\r\n{header}baggage: customer=x\r\n\r\n"
        second = f"GET /caller HTTP/1.1\r\nHost: a\r\n{header}Connection: close\r\n\r\n"
        connection.sendall(first.encode() + second.encode())
        with connection.makefile("rb") as file:
            answers_ = file.read().decode()
    assert re.findall('"customer":("x"|null)', answers_) == ['"x"', "null"]


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v2/things/3", "/v2/things/{id}"),
        ("/tenants/a/things/3", "/tenants/{tenant}/things/{id}"),
        ("/tenants/3/things/3", "/tenants/{tenant}/things/{id}"),
        ("/v3/shops/a/things/3", "/v3/shops/{shop}/things/{id}"),
        ("/hosts/things/3", None),
    ],
)
def test_access_record_has_the_template_with_each_prefix(usual, path, route):
    assert httpx.get(usual.url + path).json() == 3
    assert usual.wait_for(f"{path} 200")["http.route"] == route


def test_pages_load_from_here_those_of_a_mounted_app_too(usual, prefix):
    for mount in ("", "/v2"):
        page = httpx.get(f"{usual.url}{mount}/docs").text
        assert f"url: '{prefix}{mount}/openapi.json'" in page
        assert "https://" not in page
        (script,) = re.findall(r'<script src="([^"]*)"', page)
        assert script.startswith(f"{prefix}{mount}/static-offline-docs/")
        assert httpx.get(usual.url + script.removeprefix(prefix)).status_code == 200


def test_own_route_beside_a_page_of_the_documentation_stays(usual):
    assert httpx.post(usual.url + "/docs").json() == 3


def test_answer_that_says_what_the_system_said_is_no_error(usual):
    start = usual.mark()
    assert httpx.get(usual.url + "/files/mine").status_code == 404
    assert [line["level"] for line in usual.since(start)] == ["info"]


def test_state_of_the_app_is_the_users(usual):
    assert httpx.get(usual.url + "/readyz").status_code == 200


def test_own_header_of_safety_wins(usual):
    def policies(process: Process, path: str) -> list[str]:
        return httpx.get(process.url + path).headers.get_list("content-security-policy")

    assert policies(usual, "/own-policy") == ["default-src https:"]
    assert policies(usual, "/")[0].startswith("default-src 'self'")


def test_header_of_the_command_line_wins():
    with Process("--header", "Content-Security-Policy:default-src *") as process:
        for path in ("/", "/docs"):
            assert httpx.get(process.url + path).headers.get_list("content-security-policy") == ["default-src *"]


def test_stream_can_ask_whether_its_client_is_there(usual, prefix):
    start = usual.mark()
    with httpx.stream("GET", usual.url + "/until-gone") as response:
        assert next(response.iter_raw()) == b"tick"
    usual.wait_for(f"GET {prefix}/until-gone")
    assert {line["level"] for line in usual.since(start)} == {"info"}


def test_mounted_app_may_leave_out_what_asgi_lets_it(usual, prefix):
    assert httpx.get(usual.url + "/plain/").status_code == 204
    assert usual.wait_for(f"GET {prefix}/plain/ 204")["http.response.body.size"] == 0


def test_stream_from_one_buffer_comes_as_it_was_when_sent(usual):
    assert httpx.get(usual.url + "/reused").text == "".join(digit * 10 for digit in "0123456789")


def test_variables_of_others_do_not_switch_telemetry_on(service):
    """As HOTEL_API_URL, whose name has OTEL in it."""
    service.wait_for("Application startup complete")
    assert not service.said("elemetry")


PAGES = {"/docs": "swagger_ui_html", "/help/pages": "swagger_ui_html", "/redoc": "redoc_html"}
OTHER_DOCS = """
app = FastAPI({}, lifespan=lifespan)
@app.get("/items/{{item_id}}")
async def read_item(item_id: int) -> int:
    return item_id
"""


@pytest.mark.parametrize(
    ("options", "statuses"),
    [
        ("openapi_url=None", {"/docs": 404, "/redoc": 404, "/openapi.json": 404, "/items/5": 200}),
        ("docs_url=None", {"/docs": 404, "/redoc": 200, "/openapi.json": 200, "/items/5": 200}),
        ("redoc_url=None", {"/docs": 200, "/redoc": 404, "/openapi.json": 200, "/items/5": 200}),
        ("docs_url=None, redoc_url=None", {"/docs": 404, "/redoc": 404, "/openapi.json": 200, "/items/5": 200}),
        ("docs_url='/help/pages'", {"/docs": 404, "/help/pages": 200, "/redoc": 200}),
        ("openapi_url='/help/api.json'", {"/docs": 200, "/help/api.json": 200, "/openapi.json": 404}),
        ("swagger_ui_init_oauth={'clientId': 'mine'}", {"/docs": 200, "/docs/oauth2-redirect": 200}),
    ],
)
def test_own_choice_of_documentation_pages_holds(variant, options, statuses):
    source = variant(OTHER_DOCS.format(options))
    pages = {path: ask(source, path) for path in statuses}
    assert {path: page.status_code for path, page in pages.items()} == statuses
    if "init_oauth" in options:
        assert '"clientId": "mine"' in pages["/docs"].text
    for path in {"/docs", "/redoc", "/help/pages"} & statuses.keys():
        assert pages[path].status_code == 404 or load(source).app.url_path_for(PAGES[path]) == path
        assert "https://" not in pages[path].text.replace("https://fastapi", "")
        assert "//cdn" not in pages[path].text


SCOPE = """
import asyncio, sys
import main
sent = []
async def send(message):
    sent.append(message)
async def receive():
    return {"type": "http.request", "body": b"", "more_body": False}
for path in ("/items/5", "/readyz", "/docs"):
    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": path, "query_string": b"", "headers": []}
    asyncio.run(main.app(scope, receive, send))
print([message["status"] for message in sent if "status" in message])
"""


def test_scope_may_lack_what_asgi_lets_a_server_leave_out(variant):
    command = [sys.executable, "-c", SCOPE]
    result = subprocess.run(command, cwd=variant().parent, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("[200, 200, 200]\n", "")


@pytest.mark.parametrize(("version", "says_close"), [("1.1", True), ("2", False)])
def test_500_closes_a_connection_of_http_1_alone(version, says_close):
    scope = {"type": "http", "http_version": version, "method": "GET", "path": "/", "headers": []}
    response = asyncio.run(load(frozen()).internal_server_error(Request(scope), Exception()))
    assert ("connection" in response.headers) == says_close


EVENTS = """
from fastapi import Request
from fastapi.responses import StreamingResponse
@app.get("/events")
async def events():
    async def tell():
        try:
            while True:
                yield "data: tick\\n\\n"
                await asyncio.sleep(0.05)
        finally:
            print("events are over")
    return StreamingResponse(tell(), media_type="text/event-stream")
"""
MIDDLEWARE = """
@app.middleware("http")
async def stamp(request, call_next):
    response = await call_next(request)
    response.headers["x-stamp"] = "mine"
    return response
"""


@pytest.mark.parametrize(
    ("workers", "code", "number"),
    [
        pytest.param("1", MIDDLEWARE + EVENTS, signal.SIGTERM, id="below own middleware"),
        pytest.param("2", EVENTS, signal.SIGTERM, id="with workers"),
        pytest.param("1", EVENTS, signal.SIGINT, id="by Ctrl+C"),
    ],
)
def test_event_stream_ends_by_itself_at_the_stop_and_its_client_sees_a_whole_response(variant, workers, code, number):
    limits: dict[str, Any] = {"DRAIN_SECONDS": "0", "TIMEOUT_GRACEFUL_SHUTDOWN": "20"}
    with Process("--workers", workers, source=variant(code), **limits) as process:
        process.wait_for("Application startup complete", int(workers))
        with httpx.stream("GET", process.url + "/events", timeout=20) as response:
            ticks = response.iter_text()
            first = next(ticks)
            process.popen.send_signal(number)
            assert {*(first + "".join(ticks)).split("\n\n")} == {"data: tick", ""}
        process.end()
    assert process.said("events are over")
    assert process.said("GET /events 200")
    assert not process.said("timeout graceful shutdown exceeded")
    assert not process.said("Exception")


AFTER_EVENTS = """
import pathlib
from fastapi import BackgroundTasks
from fastapi.responses import StreamingResponse
@app.get("/events")
async def events(file: str, tasks: BackgroundTasks):
    async def save():
        while not pathlib.Path(file).exists():
            await asyncio.sleep(0.01)
        print("saved")
    tasks.add_task(save)
    return StreamingResponse(["data: tick\\n\\n"], media_type="text/event-stream")
"""


def test_background_task_of_an_event_stream_that_has_ended_gets_the_time_of_any_other(variant, tmp_path):
    limits: dict[str, Any] = {"DRAIN_SECONDS": "0", "TIMEOUT_GRACEFUL_SHUTDOWN": "20"}
    with Process(source=variant(AFTER_EVENTS), **limits) as process:
        assert httpx.get(f"{process.url}/events?file={tmp_path}/end").text == "data: tick\n\n"
        process.popen.terminate()
        process.wait_for("Waiting for background tasks to complete")
        (tmp_path / "end").touch()
        process.end()
    assert process.said("saved")


READS_FIRST = """
@app.middleware("http")
async def read_first(request, call_next):
    if "reads-first" in request.headers:
        await request.body()
    return await call_next(request)
"""


ITEM_AND_MOUNT = """
@app.post("/item")
async def post_item(item: Item) -> Item:
    return item

@app.post("/echo")
async def echo(request: Request) -> StreamingResponse:
    return StreamingResponse(request.stream())

other = FastAPI()
other.middleware("http")(stamp)
other.post("/size")(read_size)
app.mount("/other", other)
"""
RAISES = """
@app.post("/raises/{what}")
async def raise_after_the_body(request: Request, what: str) -> None:
    try:
        await request.body()
    except HTTPException as error:
        raise LookupError(what) from error
"""


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """A service with middleware of its own, and with limits to a body that are soon reached."""
    code = MIDDLEWARE + READS_FIRST + MIDDLEWARE + ITEM_AND_MOUNT
    source = write_variant(tmp_path_factory.mktemp("limited") / "main.py", code)
    with Process(source=source, MAX_BODY_BYTES="1000", CLIENT_BODY_TIMEOUT="1") as process:
        yield process
    assert not process.said("Exception")


@pytest.mark.parametrize("path", ["/size", "/item", "/other/size"])
@pytest.mark.parametrize("headers", [{}, {"Reads-First": "yes"}], ids=["passes it on", "reads it first"])
def test_body_that_is_too_large_is_a_413_whatever_is_on_its_way(limited, path, headers):
    """Whoever reads it: the operation, FastAPI for it, or an app that is mounted."""

    def post(body: bytes | Iterator[bytes]) -> httpx.Response:
        return httpx.post(limited.url + path, content=body, headers=headers)

    assert post(bytes(1000)).headers["x-stamp"] == "mine"
    for body in (bytes(1001), iter([bytes(600)] * 2)):  # the second in chunks, without a length
        answer = post(body)
        assert (answer.status_code, answer.headers["connection"]) == (413, "close")


def begin_upload(process: Process, path: str, **headers: str) -> bytes:
    """Send a part of a body; what comes until the end of the connection."""
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", urlsplit(process.url).port), 60) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: a\r\n{head}Content-Length: 10\r\n\r\n123".encode())
        with connection.makefile("rb") as file:
            return file.read()


@pytest.mark.parametrize("path", ["/size", "/item", "/other/size"])
@pytest.mark.parametrize("headers", [{}, {"Reads-First": "yes"}], ids=["passes it on", "reads it first"])
def test_body_that_stops_is_a_408_whatever_is_on_its_way(limited, path, headers):
    """Whoever reads it: the operation, FastAPI for it, or an app that is mounted."""
    answer = begin_upload(limited, path, **headers)
    assert (answer[:13], b"\r\nconnection: close" in answer) == (b"HTTP/1.1 408 ", True)
    assert answer.endswith(b'{"detail":"Request Timeout"}')


def test_stream_of_a_body_that_stops_is_cut_and_no_error(variant):
    source = variant(ITEM_AND_MOUNT.replace("stamp", "lambda request, call_next: call_next(request)"))
    with Process(source=source, CLIENT_BODY_TIMEOUT="1", DRAIN_SECONDS="0") as process:
        answer = begin_upload(process, "/echo")
        process.terminate()
    assert answer[:13] == b"HTTP/1.1 200 "
    assert not answer.endswith(b"\r\n0\r\n\r\n")
    assert {line["level"] for line in process.lines} == {"info", "warning"}


def test_exception_that_an_operation_makes_of_a_408_is_logged_behind_it(variant):
    source = variant("from fastapi import HTTPException" + RAISES)
    with Process(source=source, CLIENT_BODY_TIMEOUT="1", DRAIN_SECONDS="0") as process:
        answer = begin_upload(process, "/raises/this")
        process.terminate()
    assert answer[:13] == b"HTTP/1.1 408 "
    assert [line["exception.type"] for line in process.lines if "exception.type" in line] == ["LookupError"]
    assert process.said("POST /raises/this 408")


TEXT_FOR_BYTES = """
async def text_for_bytes(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": "hi"})
app.mount("/text", text_for_bytes)
"""


def test_piece_of_a_response_that_is_no_bytes_fails_its_own_request(variant):
    with Process(source=variant(TEXT_FOR_BYTES)) as process:
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(process.url + "/text/")
        assert httpx.get(process.url + "/").status_code == 200
        assert process.wait_for("Exception in ASGI application")["exception.type"] == "TypeError"


NAMES = """
import datetime
from asyncio import TimeoutError  # which is Python's own
from sys import exit
from typing import Annotated, Callable
from fastapi import APIRouter, Path
from starlette.exceptions import HTTPException

logger = logging.getLogger("shop")
options = Scope = 7

class Token(BaseModel):
    access_token: str

class Message(Token):
    pass

def quote(number: Annotated[int, Path()], call: Callable[[int], int] = abs) -> int:
    return call(number)

@app.get("/names")
async def names() -> list[str]:
    return [logger.name, str(options), Message(access_token="a").access_token, f"{datetime.timedelta(1)}", str(quote(-1))]
"""


def test_names_of_a_service_stay_what_it_has_made_them(variant):
    with Process(source=variant("import logging" + NAMES)) as process:
        assert httpx.get(process.url + "/names").json() == ["shop", "7", "a", "1 day, 0:00:00", "1"]


@pytest.mark.parametrize("names", ["Lifecycle, json_lines, main", "list, dict, str, type, isinstance", "signal, sys"])
def test_names_that_the_containers_side_has_taken_are_told_and_end_the_start(variant, names):
    process = Process(source=variant(f"{names.replace(',', ' =')} = lambda *_: 0"))
    assert process.end() == 1
    (line,) = process.lines
    assert line["message"].endswith(f" that the container's side needs; call them differently: {names}")
