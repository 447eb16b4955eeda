"""A client that sees every byte, and the service that it talks to."""

import socket
import ssl
import struct
from io import BufferedReader
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

from tests.harness import Process

SERVICE = """
import asyncio

from fastapi import BackgroundTasks, WebSocket
from fastapi.responses import StreamingResponse

gates = {}

class Intended(Exception):
    pass

async def gate(name):
    await gates.setdefault(name, asyncio.Event()).wait()

@app.get("/open/{name}")
async def open_gate(name: str) -> None:
    gates.setdefault(name, asyncio.Event()).set()

@app.get("/wait/{name}")
async def wait(name: str) -> str:
    await gate(name)
    return name

@app.get("/broken/{name}")
async def broken(name: str) -> str:
    await gate(name)
    raise Intended

runs = 0

@app.post("/run")
async def run() -> None:
    global runs
    runs += 1

@app.get("/runs")
async def read_runs() -> int:
    return runs

@app.post("/item")
async def item(item: Item) -> Item:
    return item

@app.post("/fields")
async def fields(request: Request) -> list[str]:
    await request.body()
    return request.headers.keys()

async def count(scope, receive, send):
    # Begins its response before it reads the body: a StreamingResponse would take some of that for itself.
    request = Request(scope, receive)
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    size = sum([len(piece) async for piece in request.stream()])
    await send({"type": "http.response.body", "body": str(size).encode()})

app.mount("/count", count)

@app.post("/read-slowly")
async def read_slowly(request: Request) -> int:
    size = 0
    async for piece in request.stream():
        if not size:
            await asyncio.sleep(2)
        size += len(piece)
    return size

@app.get("/stream/{name}")
async def stream(name: str):
    async def lines():
        yield b"first\\n"
        await gate(name)
        yield b"last\\n"
    return StreamingResponse(lines())

made = running = 0

@app.get("/endless")
async def endless():
    async def chunks():  # with never a wait of its own
        global made, running
        running += 1
        try:
            while True:
                made += 1
                yield bytes(1_000_000)
        finally:
            running -= 1
    return StreamingResponse(chunks())

@app.get("/running")
async def read_running() -> int:
    return running

@app.get("/made")
async def read_made() -> int:
    return made

async def block(file: str) -> None:
    while not os.path.exists(file):
        time.sleep(0.01)

@app.api_route("/blocks-afterwards", methods=["GET", "HEAD"])
async def blocks_afterwards(file: str, background_tasks: BackgroundTasks) -> str:
    background_tasks.add_task(block, file)
    return "blocks"

@app.get("/blocks")
async def blocks(file: str) -> str:
    open(f"{file}.begun", "w").close()
    await block(file)
    return "blocks"

@app.get("/threshold")
async def threshold() -> int:
    return gc.get_threshold()[0]

three = asyncio.Barrier(3)

@app.get("/threshold/of-three")
async def threshold_of_three(another: int = 0) -> int:
    # Of three that go on in one turn of the event loop: the third finds two responses that wait.
    usual = gc.get_threshold()[0]
    await three.wait()
    found = gc.get_threshold()[0]
    if another and found != usual:
        gc.set_threshold(another)
    return found

@app.websocket("/ws")
async def ws(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)
"""

PATIENT: dict[str, Any] = {
    name: "3600" for name in ("TIMEOUT_KEEP_ALIVE", "CLIENT_HEADER_TIMEOUT", "CLIENT_BODY_TIMEOUT")
}
GET = b"GET /items/5 HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET /items/6 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
SMUGGLED = b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"


BODIES = {
    "no body": (b"", b"", 0),
    "a length": (b"Content-Length: %d\r\n" % len(SMUGGLED), SMUGGLED, len(SMUGGLED)),
    "chunks": (
        b"Transfer-Encoding: chunked\r\n",
        b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
        len(SMUGGLED),
    ),
}


class Answer(NamedTuple):
    status: int
    fields: dict[str, str]
    body: bytes


class Client:
    """One connection; the service has 30 seconds for whatever is awaited, so that what never comes fails a test."""

    def __init__(self, process: Process, tls: ssl.SSLContext | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", urlsplit(process.url).port or 0), timeout=30)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_hostname="127.0.0.1")
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file: BufferedReader = self.socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        self.socket.close()

    def send(self, *data: bytes) -> None:
        for piece in data:
            self.socket.sendall(piece)

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and fields of the next response."""
        line = self.file.readline()
        assert line.startswith(b"HTTP/1.1 "), line
        fields = {}
        while (field := self.file.readline()) != b"\r\n":
            name, _, value = field.decode().partition(":")
            fields[name] = value.strip()
        return int(line.split()[1]), fields

    def answer(self, has_body: bool = True) -> Answer:
        status, fields = self.head()
        if not has_body:
            return Answer(status, fields, b"")
        if "content-length" in fields:
            return Answer(status, fields, self.file.read(int(fields["content-length"])))
        body = b""
        while piece := self.chunk():
            body += piece
        return Answer(status, fields, body)

    def chunk(self) -> bytes:
        """The next chunk of a response; empty at its end."""
        size = self.file.readline()
        piece = self.file.read(int(size, 16))
        assert self.file.readline() == b"\r\n"
        return piece

    def answers(self) -> list[Answer]:
        """All that come until the service ends the connection."""
        found = []
        while self.file.peek(1):
            found.append(self.answer())
        return found

    def statuses(self) -> list[int]:
        return [answer.status for answer in self.answers()]

    def leave(self) -> None:
        """Break the connection off, without an end."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.__exit__()


def get(process: Process, path: str) -> bytes:
    """The body of the answer to a request of the test's own, beside those that it is about."""
    with Client(process) as client:
        client.send(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
        (answer,) = client.answers()
        assert answer.status == 200
        return answer.body


def request(line: bytes = b"GET /items/5 HTTP/1.1", *fields: bytes, host: bool = True, body: bytes = b"") -> bytes:
    return b"\r\n".join([line, *([b"Host: a"] if host else []), *fields, b"", body])


def refusals(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["message"] == "Invalid HTTP request received."]
