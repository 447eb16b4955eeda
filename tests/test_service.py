"""What a user writes in the first part of main.py, and what his clients send, is as on a plain uvicorn."""

import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.harness import TRACEPARENT, Process, with_packages


@pytest.mark.parametrize("what", ["Exception", "500"])
def test_own_handler_of_an_exception_answers(variant, what):
    source = variant(f"""
from fastapi.responses import PlainTextResponse
@app.exception_handler({what})
async def own(request, error):
    return PlainTextResponse("mine", 500)
@app.get("/broken")
async def broken():
    raise LookupError
""")
    with Process(source=source) as process:
        response = httpx.get(process.url + "/broken")
        assert (response.status_code, response.text) == (500, "mine")
        process.wait_for("Exception in ASGI application")


ECHO = """
from fastapi import WebSocket
@app.websocket("/socket")
async def echo(socket: WebSocket):
    await socket.accept()
    async for text in socket.iter_text():
        await socket.send_text(text)
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


def test_idle_websockets_have_a_limit_of_their_own(variant):
    command, environment = with_packages("websockets")
    limits: dict[str, Any] = {"MAX_CONCURRENCY": "2", "MAX_WEBSOCKETS": "3"}

    def open_socket() -> int:
        """The status that the handshake gets."""
        connection = sockets.enter_context(socket.create_connection(("127.0.0.1", urlsplit(process.url).port)))
        connection.sendall(HANDSHAKE)
        return int(connection.recv(65536).split()[1])

    with Process(command=command, source=variant(ECHO), **environment, **limits) as process, ExitStack() as sockets:
        assert [open_socket() for _ in range(4)] == [101, 101, 101, 503]
        assert [httpx.get(process.url).status_code for _ in range(3)] == [200] * 3


SLOW = """
import threading
may_end = threading.Event()
@app.get("/slow")
def slow():
    print("slow has begun")
    may_end.wait()
@app.get("/end")
async def end() -> None:
    may_end.set()
@app.get("/broken")
async def broken():
    raise LookupError
"""


def test_500_waits_for_no_thread(variant):
    with Process(source=variant(SLOW)) as process, ThreadPoolExecutor(45) as pool:
        slow = [pool.submit(httpx.get, process.url + "/slow", timeout=120) for _ in range(45)]
        process.wait_for("slow has begun", 40)  # as many threads as there are
        try:
            assert httpx.get(process.url + "/broken", timeout=20).status_code == 500
        finally:
            httpx.get(process.url + "/end", timeout=20)
        assert {response.result().status_code for response in slow} == {200}


def test_package_may_import_late(variant):
    source = variant("""
@app.get("/late")
def late() -> int:
    from pydantic.v1 import BaseModel
    class Old(BaseModel):
        number: int
    return Old(number="3").number
""")
    with Process(source=source) as process:
        assert httpx.get(process.url + "/late").json() == 3


def test_template_is_rendered(variant, tmp_path):
    (tmp_path / "page.html").write_text("{% for i in range(number) %}{{ i }}{% endfor %}")
    source = variant(f"""
from fastapi import Request
from fastapi.templating import Jinja2Templates
templates = Jinja2Templates({str(tmp_path)!r})
@app.get("/page")
async def page(request: Request):
    return templates.TemplateResponse(request, "page.html", {{"number": 3}})
""")
    command, environment = with_packages("jinja2")
    with Process(command=command, source=source, **environment) as process:
        response = httpx.get(process.url + "/page")
        assert (response.status_code, response.text) == (200, "012")


UPLOAD = """
import resource, tempfile
from fastapi import UploadFile
@app.post("/upload")
async def upload(file: UploadFile) -> int:
    return len(await file.read())
"""


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        ('tempfile.tempdir = "/nonexistent"', "FileNotFoundError"),
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))", "OSError"),
    ],
)
def test_upload_that_finds_no_room_says_why_in_the_log(variant, trouble, cause):
    command, environment = with_packages("python-multipart")
    environment["MAX_BODY_BYTES"] = "5_000_000"
    with Process(command=command, source=variant(f"{UPLOAD}{trouble}\n"), **environment) as process:
        small, large = (
            httpx.post(process.url + "/upload", files={"file": bytes(size)}, timeout=20) for size in (10, 3_000_000)
        )
        assert (small.status_code, small.text) == (200, "10")
        assert large.status_code in {400, 500}
        line = process.wait_for("POST /upload: " if large.status_code == 400 else "Exception in ASGI application")
    assert line["exception.type"] == cause


CALLER = """
from fastapi import APIRouter
from opentelemetry import baggage
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
"""


def test_what_the_caller_says_of_its_trace_reaches_the_app(variant):
    headers = {"traceparent": TRACEPARENT, "tracestate": "vendor=1", "baggage": "customer=x"}
    with Process(source=variant(CALLER)) as process:
        assert httpx.get(process.url + "/caller", headers=headers).json() == {
            "carried": {"traceparent": TRACEPARENT, "tracestate": "vendor=1", "baggage": "customer=x"},
            "customer": "x",
        }
        assert httpx.get(process.url + "/caller").json() == {"carried": {}, "customer": None}


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
@pytest.mark.parametrize("arguments", [(), ("--root-path", "/api")])
def test_access_record_has_the_template_with_each_prefix(variant, path, route, arguments):
    with Process(*arguments, source=variant(CALLER)) as process:
        assert httpx.get(process.url + path).json() == 3
        assert process.wait_for(f"{path} 200")["http.route"] == route


def test_variables_of_others_do_not_switch_telemetry_on():
    with Process(HOTEL_API_URL="http://hotel", DRAIN_SECONDS="0") as process:
        process.terminate()
    assert not [line for line in process.lines if line["level"] != "info"]
    assert not process.said("elemetry")


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
    with Process(source=variant(OTHER_DOCS.format(options))) as process:
        pages = {path: httpx.get(process.url + path) for path in statuses}
        assert {path: page.status_code for path, page in pages.items()} == statuses
        if "init_oauth" in options:
            assert '"clientId": "mine"' in pages["/docs"].text
        for path in {"/docs", "/redoc", "/help/pages"} & statuses.keys():
            assert "https://" not in pages[path].text.replace("https://fastapi", "")
            assert "//cdn" not in pages[path].text


OWN_POLICY = """
from fastapi import Response
@app.get("/own")
async def own(response: Response) -> None:
    response.headers["Content-Security-Policy"] = "default-src https:"
"""


def test_own_header_of_safety_wins(variant):
    def policies(path: str) -> list[str]:
        return httpx.get(process.url + path).headers.get_list("content-security-policy")

    with Process(source=variant(OWN_POLICY)) as process:
        assert policies("/own") == ["default-src https:"]
        assert policies("/")[0].startswith("default-src 'self'")
    with Process("--header", "Content-Security-Policy:default-src *", source=variant(OWN_POLICY)) as process:
        assert policies("/") == ["default-src *"]


def test_state_of_the_app_is_the_users(variant):
    with Process(source=variant("app.state.ready = False\n")) as process:
        assert httpx.get(process.url + "/readyz").status_code == 200


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
@app.get("/until-gone")
async def until_gone(request: Request):
    async def tell():
        while not await request.is_disconnected():
            yield b"tick"
            await asyncio.sleep(0.05)
        print("the client has gone")
    return StreamingResponse(tell())
"""


def stop_amid_events(process: Process) -> None:
    """Stop the service while a client reads its event stream, which ends by itself, and whole."""
    with httpx.stream("GET", process.url + "/events", timeout=20) as response:
        ticks = response.iter_text()
        first = next(ticks)
        process.popen.terminate()
        assert {*(first + "".join(ticks)).split("\n\n")} == {"data: tick", ""}
    process.end()
    assert process.said("events are over")
    assert not process.said("timeout graceful shutdown exceeded")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_event_stream_ends_by_itself_at_the_stop_and_its_client_sees_a_whole_response(variant, workers):
    limits: dict[str, Any] = {"DRAIN_SECONDS": "0", "TIMEOUT_GRACEFUL_SHUTDOWN": "20"}
    with Process("--workers", workers, source=variant(EVENTS), **limits) as process:
        process.wait_for("Application startup complete", int(workers))
        stop_amid_events(process)
    assert process.said("GET /events 200")
    assert not process.said("Exception")


def test_stream_can_ask_whether_its_client_is_there(variant):
    with Process(source=variant(EVENTS)) as process:
        with httpx.stream("GET", process.url + "/until-gone") as response:
            assert next(response.iter_raw()) == b"tick"
        process.wait_for("GET /until-gone")
    assert not process.said("Exception")


BODY = """
from fastapi import Request
@app.post("/body")
async def read_body(request: Request) -> int:
    return len(await request.body())
"""
MIDDLEWARE = """
@app.middleware("http")
async def stamp(request, call_next):
    response = await call_next(request)
    response.headers["x-stamp"] = "mine"
    return response
"""


def test_own_middleware_keeps_refusals_of_a_body_what_they_are(variant):
    source = variant(BODY + MIDDLEWARE + MIDDLEWARE)
    with Process(source=source, MAX_BODY_BYTES="1000", CLIENT_BODY_TIMEOUT="1") as process:
        assert httpx.post(process.url + "/body", content=bytes(1000)).headers["x-stamp"] == "mine"
        announced = httpx.post(process.url + "/body", content=bytes(1001))
        chunked = httpx.post(process.url + "/body", content=iter([bytes(600)] * 2))
        assert [answer.status_code for answer in (announced, chunked)] == [413, 413]
        with socket.create_connection(("127.0.0.1", urlsplit(process.url).port), 60) as connection:
            connection.sendall(b"POST /body HTTP/1.1\r\nHost: service\r\nContent-Length: 10\r\n\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
    assert not process.said("Exception")


READS_FIRST = """
@app.middleware("http")
async def read_first(request, call_next):
    await request.body()
    return await call_next(request)
"""


def test_own_middleware_that_reads_a_body_which_stops_is_answered_408_and_the_end(variant):
    with Process(source=variant(BODY + READS_FIRST), CLIENT_BODY_TIMEOUT="1") as process:
        connection = socket.create_connection(("127.0.0.1", urlsplit(process.url).port), 60)
        with connection:
            connection.sendall(b"POST /body HTTP/1.1\r\nHost: service\r\nContent-Length: 10\r\n\r\n")
            answer = connection.recv(65536)
    assert (answer[:13], b"\r\nconnection: close" in answer) == (b"HTTP/1.1 408 ", True)
    assert not process.said("Exception")


def test_event_stream_below_own_middleware_ends_by_itself_at_the_stop(variant):
    limits: dict[str, Any] = {"DRAIN_SECONDS": "0", "TIMEOUT_GRACEFUL_SHUTDOWN": "20"}
    with Process(source=variant(MIDDLEWARE + EVENTS), **limits) as process:
        stop_amid_events(process)
    assert not process.said("Exception")


@pytest.mark.parametrize("arguments", [(), ("--root-path", "/api")])
def test_pages_of_a_mounted_app_load_from_here(variant, arguments):
    with Process(*arguments, source=variant(CALLER)) as process:
        page = httpx.get(process.url + "/v2/docs").text
        assert "https://" not in page
        prefix = arguments[1] if arguments else ""
        (script,) = re.findall(r'<script src="([^"]*)"', page)
        assert script.startswith(f"{prefix}/v2/static-offline-docs/")
        assert httpx.get(process.url + script.removeprefix(prefix)).status_code == 200


NAMES = """
import datetime
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


@pytest.mark.parametrize("name", ["Lifecycle", "json_lines", "main", "list"])
def test_name_that_the_containers_side_has_taken_is_told_and_ends_the_start(variant, name):
    process = Process(source=variant(f"{name} = 0"))
    assert process.end() == 1
    (line,) = process.lines
    assert line["message"] == f"main.py: the container's side has names of its own that are yours, too: {name}"
