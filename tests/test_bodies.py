"""What the limits to a body promise: a refusal that its client gets, whatever of the user's is on its way."""

import socket
from collections.abc import Iterator
from contextlib import suppress
from urllib.parse import urlsplit

import httpx
import pytest

from tests.harness import MIDDLEWARE, Process, write_variant

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


@pytest.mark.parametrize("middleware", ["", MIDDLEWARE], ids=["alone", "below own middleware"])
def test_stream_of_a_body_that_stops_or_is_too_large_is_cut_and_no_error(variant, middleware):
    source = variant(middleware + ITEM_AND_MOUNT.replace("stamp", "lambda request, call_next: call_next(request)"))
    with Process(source=source, CLIENT_BODY_TIMEOUT="1", MAX_BODY_BYTES="1000", DRAIN_SECONDS="0") as process:
        late = begin_upload(process, "/echo")
        with socket.create_connection(("127.0.0.1", urlsplit(process.url).port), 60) as connection:
            connection.sendall(b"POST /echo HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            chunk = b"258\r\n" + bytes(600) + b"\r\n"
            connection.sendall(chunk)
            with connection.makefile("rb") as file:
                large = file.read(200)
                connection.sendall(chunk)
                with suppress(ConnectionResetError):
                    large += file.read()
        process.terminate()
    for answer in (late, large):
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
