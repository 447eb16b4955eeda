"""What a user's own packages add, beside the lock: WebSockets, templates, uploads."""

import socket
from contextlib import ExitStack
from urllib.parse import urlsplit

import httpx
import pytest

from tests.harness import Process, with_packages, write_variant

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
