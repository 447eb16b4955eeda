"""What a user writes in the first part of main.py, and what his clients send, is as on a plain uvicorn."""

import asyncio
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from fastapi import Request

from tests.harness import TRACEPARENT, Process, frozen, load, write_variant


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


def test_pages_load_from_here_below_a_prefix_that_ends_in_a_slash_too():
    assert 'src="/static-offline-docs/' in ask(frozen(), "/docs", root_path="/").text


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
