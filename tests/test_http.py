"""What clients get on the wire, byte by byte: of requests that are whole, odd, slow, too large or broken off."""

import socket
import struct
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import urlsplit

import pytest

from tests.harness import UV, Process, wait_until, write_variant

SERVICE = """
from fastapi import BackgroundTasks, Request, WebSocket
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

@app.api_route("/size", methods=["GET", "POST"])
async def size(request: Request) -> int:
    return len(await request.body())

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

made = 0

@app.get("/endless")
async def endless():
    async def chunks():  # with never a wait of its own
        global made
        while True:
            made += 1
            yield bytes(1_000_000)
    return StreamingResponse(chunks())

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

@app.websocket("/ws")
async def ws(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)
"""

PATIENT = {name: "3600" for name in ("TIMEOUT_KEEP_ALIVE", "CLIENT_HEADER_TIMEOUT", "CLIENT_BODY_TIMEOUT")}
GET = b"GET /items/5 HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET /items/6 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
SMUGGLED = b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"


class Answer(NamedTuple):
    status: int
    fields: dict[str, str]
    body: bytes


class Client:
    """One connection; the service has 30 seconds for whatever is awaited, so that what never comes fails a test."""

    def __init__(self, process: Process) -> None:
        self.socket = socket.create_connection(("127.0.0.1", urlsplit(process.url).port or 0), timeout=30)
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


def serve(source: Path, *arguments: str, **options) -> Iterator[Process]:
    """The service with these deadlines and no others; nothing that a client does is an error in its log."""
    with Process(*arguments, source=source, **options) as process:
        yield process
        get(process, "/items/99")
        process.wait_for("/items/99")
        ours = [line for line in process.lines if line.get("exception.type") != "Intended"]
        assert [line for line in ours if line.get("level", "error") in {"error", "critical"}] == []


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_variant(tmp_path_factory.mktemp("http") / "main.py", SERVICE)


@pytest.fixture(scope="module")
def patient(source):
    yield from serve(source, **PATIENT)


@pytest.fixture(scope="module")
def short_idle(source):
    yield from serve(source, **PATIENT | {"TIMEOUT_KEEP_ALIVE": "1"})


@pytest.fixture(scope="module")
def short_head(source):
    yield from serve(source, **PATIENT | {"CLIENT_HEADER_TIMEOUT": "1"})


@pytest.fixture(scope="module")
def short_body(source):
    yield from serve(source, **PATIENT | {"CLIENT_BODY_TIMEOUT": "1"}, MAX_BODY_BYTES="10000000")


@pytest.fixture(scope="module")
def sockets(source):
    """With a package for WebSockets, which the service itself does not have."""
    layered = (UV, "run", "--quiet", "--no-project", "--python", sys.executable, "--with", "websockets==17.4", "python")
    yield from serve(source, command=layered, **PATIENT)


def mark(process: Process) -> int:
    """How many lines the log has, once all that happened so far is in it; the last is of this request."""
    count = len(process.said("GET /items/98"))
    get(process, "/items/98")
    process.wait_for("GET /items/98", count + 1)
    return len(process.lines)


@pytest.fixture
def fixture(request: pytest.FixtureRequest):
    return request.getfixturevalue


def records(process: Process, start: int) -> list[dict]:
    """What has been logged since a mark."""
    return process.lines[start : mark(process) - 1]


def refusals(lines: list[dict]) -> list[dict]:
    return [line for line in lines if line["message"] == "Invalid HTTP request received."]


# --- Requests that are whole ---

UPGRADES = {
    "h2c, as Java's client": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n",
    "foo": b"Connection: keep-alive, Upgrade\r\nUpgrade: foo\r\n",
    "websocket without a package for it": b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
}
BODIES = {
    "no body": (b"", b"", 0),
    "a length": (b"Content-Length: %d\r\n" % len(SMUGGLED), SMUGGLED, len(SMUGGLED)),
    "chunks": (
        b"Transfer-Encoding: chunked\r\n",
        b"%x\r\n%s\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
        len(SMUGGLED),
    ),
}


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("packets", [1, 2])
@pytest.mark.parametrize("method", [b"GET", b"POST"])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("upgrade", UPGRADES)
def test_request_for_another_protocol_is_served_as_if_it_did_not_ask(patient, upgrade, body, method, packets, is_first):
    fields, data, size = BODIES[body]
    head = b"%s /count/ HTTP/1.1\r\nHost: a\r\n%s%s\r\n" % (method, UPGRADES[upgrade], fields)
    before = int(get(patient, "/runs"))
    with Client(patient) as client:
        if not is_first:
            client.send(GET)
            client.answer()
        if packets == 1:
            client.send(head + data + LAST)
        client.send(head) if packets == 2 else None
        begun = client.head()
        assert (begun[0], client.chunk()) == (200, b"begun")
        client.send(data + LAST) if packets == 2 else None
        assert (client.chunk(), client.chunk()) == (b"%d" % size, b"")
        assert [answer.body for answer in client.answers()] == [b'{"item_id":6,"q":null}']
    assert int(get(patient, "/runs")) == before


def test_trailers_are_none_of_the_heads_fields(patient):
    with Client(patient) as client:
        head = request(b"POST /fields HTTP/1.1", b"Transfer-Encoding: chunked")
        client.send(head + b"1\r\nx\r\n0\r\nX-Admin: yes\r\n\r\n")
        assert client.answer().body == b'["host","transfer-encoding"]'


def request(line: bytes = b"GET /items/5 HTTP/1.1", *fields: bytes, host: bool = True, body: bytes = b"") -> bytes:
    return b"\r\n".join([line, *([b"Host: a"] if host else []), *fields, b"", body])


# What has no status is incomplete: nothing is answered until the rest comes.
RULES = {
    "a request": (request(), 200),
    "HTTP/1.0 without a host": (request(b"GET /items/5 HTTP/1.0", host=False), 200),
    "an empty line before a request": (b"\r\n" + request(), 200),
    "an absolute target": (request(b"GET http://a/items/5 HTTP/1.1"), 200),
    "a query": (request(b"GET /items/5?q=a?b=c HTTP/1.1"), 200),
    "a field without a value": (request(b"GET /items/5 HTTP/1.1", b"X:"), 200),
    "spaces around a value": (request(b"GET /items/5 HTTP/1.1", b"X: \t x \t "), 200),
    "an odd but valid name": (request(b"GET /items/5 HTTP/1.1", b"!#$%&'*+-.^_`|~: x"), 200),
    "a value of high bytes": (request(b"GET /items/5 HTTP/1.1", b"X: \xfc"), 200),
    "a length of zero": (request(b"GET /items/5 HTTP/1.1", b"Content-Length: 0"), 200),
    "a body that nobody asked for": (request(b"GET /items/5 HTTP/1.1", b"Content-Length: 3", body=b"abc"), 200),
    "a body of chunks": (request(b"GET /size HTTP/1.1", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 200),
    "an expectation": (request(b"GET /items/5 HTTP/1.1", b"Expect: 100-continue"), 200),
    "a method that is not allowed": (request(b"DELETE /items/5 HTTP/1.1"), 405),
    "no host": (request(host=False), 400),
    "two hosts": (request(b"GET /items/5 HTTP/1.1", b"Host: b"), 400),
    "two equal hosts": (request(b"GET /items/5 HTTP/1.1", b"host: a"), 400),
    "a method that is none": (request(b"NONE /items/5 HTTP/1.1"), 400),
    "a method in small letters": (request(b"get /items/5 HTTP/1.1"), 400),
    "no target": (request(b"GET HTTP/1.1"), 400),
    "two spaces before the target": (request(b"GET  HTTP/1.1"), 400),
    "a version that does not exist": (request(b"GET /items/5 HTTP/9.9"), 400),
    "another protocol": (request(b"GET /items/5 HTPP/1.1"), 400),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "more after the version": (request(b"GET /items/5 HTTP/1.1 x"), 400),
    "a line that ends with CR alone": (b"GET /items/5 HTTP/1.1\rHost: a\r\r", 400),
    "a space before a colon": (request(b"GET /items/5 HTTP/1.1", b"X : x"), 400),
    "a name with a space": (request(b"GET /items/5 HTTP/1.1", b"X Y: x"), 400),
    "a name that is empty": (request(b"GET /items/5 HTTP/1.1", b": x"), 400),
    "a field without a colon": (request(b"GET /items/5 HTTP/1.1", b"X"), 400),
    "a control character in a value": (request(b"GET /items/5 HTTP/1.1", b"X: a\x01b"), 400),
    "a null byte in a value": (request(b"GET /items/5 HTTP/1.1", b"X: a\0b"), 400),
    "a value with CR alone": (request(b"GET /items/5 HTTP/1.1", b"X: a\rY: b"), 400),
    "a space before the first field": (b"GET /items/5 HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "a length that is negative": (request(b"POST /size HTTP/1.1", b"Content-Length: -1"), 400),
    "a length that is no number": (request(b"POST /size HTTP/1.1", b"Content-Length: x"), 400),
    "a length with a sign": (request(b"POST /size HTTP/1.1", b"Content-Length: +1", body=b"x"), 400),
    "a length that overflows": (request(b"POST /size HTTP/1.1", b"Content-Length: " + b"9" * 30), 400),
    "two lengths": (request(b"POST /size HTTP/1.1", b"Content-Length: 1", b"Content-Length: 2", body=b"xx"), 400),
    "a length beside chunks": (
        request(b"POST /size HTTP/1.1", b"Content-Length: 1", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        400,
    ),
    "a coding after chunked": (request(b"POST /size HTTP/1.1", b"Transfer-Encoding: chunked, gzip"), 400),
    "a chunk whose size is no number": (
        request(b"POST /size HTTP/1.1", b"Transfer-Encoding: chunked", body=b"x\r\nx\r\n0\r\n\r\n"),
        400,
    ),
    "a chunk that is longer than it says": (
        request(b"POST /size HTTP/1.1", b"Transfer-Encoding: chunked", body=b"1\r\nxx\r\n0\r\n\r\n"),
        400,
    ),
    "a chunk whose size overflows": (
        request(b"POST /size HTTP/1.1", b"Transfer-Encoding: chunked", body=b"f" * 20 + b"\r\nx\r\n0\r\n\r\n"),
        400,
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_rule_of_http_holds(patient, rule):
    """The rules of RFC 9112; after a refusal comes the end, after anything else the next request."""
    data, status = RULES[rule]
    start = mark(patient)
    with Client(patient) as client:
        client.send(data)
        answer = client.answer()
        assert answer.status == status
        assert (answer.fields.get("connection") == "close") == (status == 400 or b"HTTP/1.0" in data)
        if answer.fields.get("connection") == "close":
            assert client.statuses() == []
        else:
            client.send(LAST)
            assert client.statuses() == [200]
    if status == 400:
        refusals = [line for line in records(patient, start) if line["level"] == "warning"]
        assert [line["client.address"] for line in refusals] == ["127.0.0.1"]


def test_request_in_pieces_is_served(patient):
    data = request(b"POST /size HTTP/1.1", b"Connection: close", b"Content-Length: 3", body=b"abc")
    with Client(patient) as client:
        client.send(*(bytes([byte]) for byte in data))
        assert [answer.body for answer in client.answers()] == [b"3"]


# --- A request that is refused ---


def test_body_over_the_limit_gets_one_whole_413_and_its_neighbours_their_answers(patient):
    """A client that sends all of its 2 MB first, and then reads; others on connections that they use again."""
    lengths = request(b"POST /size HTTP/1.1", b"Content-Length: 2000000", body=b"x" * 2_000_000)
    piece = b"%x\r\n%s\r\n" % (100_000, b"x" * 100_000)
    chunks = request(b"POST /size HTTP/1.1", b"Transfer-Encoding: chunked", body=piece * 20 + b"0\r\n\r\n")
    start, is_over = mark(patient), threading.Event()

    def upload(number: int) -> list[Answer]:
        with Client(patient) as client:
            client.send([lengths, chunks][number % 2])
            return client.answers()

    def use_again(_: int) -> set[int]:
        found = set()
        with Client(patient) as client:
            while not is_over.is_set():
                client.send(GET)
                found.add(client.answer().status)
        return found

    with ThreadPoolExecutor(8) as pool:
        neighbours = pool.map(use_again, range(4))
        try:
            uploads = [*pool.map(upload, range(60))]
        finally:
            is_over.set()
        assert [*neighbours] == [{200}] * 4
    answers = [[(answer.status, answer.fields.get("connection")) for answer in each] for each in uploads]
    assert answers == [[(413, "close")]] * 60
    assert {line["level"] for line in records(patient, start)} == {"info"}


REFUSED_UPLOADS = {
    "over the limit": (request(b"POST /size HTTP/1.1", b"Content-Length: 1000000000"), 413),
    "without a host": (request(b"POST /size HTTP/1.1", b"Content-Length: 1000000000", host=False), 400),
    "with a bad chunk": (request(b"POST /size HTTP/1.1", b"Transfer-Encoding: chunked", body=b"x\r\n"), 400),
}


@pytest.mark.parametrize("refused", REFUSED_UPLOADS)
def test_client_that_goes_on_sending_after_its_refusal_is_ended_in_time(short_idle, refused):
    head, status = REFUSED_UPLOADS[refused]
    start = mark(short_idle)
    with ThreadPoolExecutor() as pool, Client(short_idle) as client:
        client.send(head)

        def send_until_the_end() -> None:
            with suppress(ConnectionError):
                while True:
                    client.send(bytes(1000))

        sent = pool.submit(send_until_the_end)
        assert client.statuses() == [status]
        sent.result(30)
    assert len([line for line in records(short_idle, start) if line["level"] == "warning"]) == (status == 400)


def test_400_to_a_client_that_sends_2_mb_is_whole(patient):
    data = request(b"POST /size HTTP/1.1", b"Content-Length: 2000000", host=False, body=b"x" * 2_000_000)
    for _ in range(20):
        with Client(patient) as client:
            client.send(data)
            assert client.statuses() == [400]


BAD = {
    "a request that cannot be read": b"\r\n\r\nnonsense\r\n\r\n",
    "a request without a host": b"GET /items/5 HTTP/1.1\r\n\r\n",
    "a bad chunk": b"POST /run HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n",
    "a CONNECT": b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("path", ["wait", "stream"])
def test_refusal_waits_for_the_responses_before_it_and_is_then_an_end(patient, path, bad):
    start, runs = mark(patient), int(get(patient, "/runs"))
    name = f"{path}-{[*BAD].index(bad)}"
    with Client(patient) as client:
        client.send(f"GET /{path}/{name} HTTP/1.1\r\nHost: a\r\n\r\n".encode(), GET + BAD[bad])
        patient.wait_for("Invalid HTTP request received.", 1 + len(refusals(patient.lines[:start])))
        get(patient, f"/open/{name}")
        assert client.statuses() == [200, 200]
    assert len(refusals(records(patient, start))) == 1
    assert int(get(patient, "/runs")) == runs


def test_bad_chunk_amid_the_response_to_it_ends_that(patient):
    with Client(patient) as client:
        client.send(request(b"POST /count/ HTTP/1.1", b"Transfer-Encoding: chunked"))
        assert client.head()[0] == 200
        assert client.chunk() == b"begun"
        client.send(b"x\r\n")
        assert client.file.read() == b""


def test_refusal_right_behind_a_response_is_no_second_one_and_loses_no_first(patient):
    trailers = b"0\r\n" + b"X: x\r\n" * 100_000
    for _ in range(10):
        with Client(patient) as client:
            client.send(request(b"POST /items/5 HTTP/1.1", b"Transfer-Encoding: chunked"), trailers)
            assert client.statuses() in ([400], [405])


def test_more_requests_than_100_before_their_answers_end_the_connection_after_those(patient):
    with Client(patient) as client:
        count = len(refusals(patient.lines[: mark(patient)]))
        client.send(b"GET /wait/pipeline HTTP/1.1\r\nHost: a\r\n\r\n" + GET * 200)
        patient.wait_for("Invalid HTTP request received.", count + 1)
        get(patient, "/open/pipeline")
        assert client.statuses() == [200] * 101  # one that was served, and 100 that waited


def test_request_after_an_exception_is_not_run_when_the_rest_of_it_comes(patient):
    runs = int(get(patient, "/runs"))
    for number, rest in enumerate([SMUGGLED[:30], b"POST /run HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nx"]):
        with Client(patient) as client:
            client.send(f"GET /broken/{number} HTTP/1.1\r\nHost: a\r\n\r\n".encode() + rest)
            get(patient, f"/open/{number}")
            answer = client.answer()
            assert (answer.status, answer.fields["connection"]) == (500, "close")
            with suppress(ConnectionError):
                client.send(SMUGGLED[30:] if number == 0 else b"yz", SMUGGLED)
            assert client.statuses() == []
    assert int(get(patient, "/runs")) == runs


# --- Time ---


@pytest.mark.parametrize("deadline", ["short_body", "short_idle"])
def test_upload_that_the_service_reads_slowly_is_whole(fixture, deadline):
    size = 1_000_000
    with Client(fixture(deadline)) as client:
        client.send(request(b"POST /read-slowly HTTP/1.1", b"Content-Length: %d" % size, body=bytes(size)))
        assert client.answer().body == b"%d" % size


def test_upload_longer_than_each_deadline_is_whole_while_bytes_arrive(short_body, short_idle, short_head):
    def upload(process: Process) -> bytes:
        with Client(process) as client:
            head = request(b"POST /count/ HTTP/1.1", b"Content-Length: 8")
            client.send(*(bytes([byte]) for byte in head))
            client.head()
            client.chunk()
            for _ in range(8):
                threading.Event().wait(0.25)  # a client that sends slowly is what this is about
                client.send(b"x")
            return client.chunk()

    with ThreadPoolExecutor(3) as pool:
        assert [*pool.map(upload, (short_body, short_idle, short_head))] == [b"8"] * 3


@pytest.mark.parametrize("path", ["size", "item"])
def test_upload_that_stops_gets_a_408_and_the_end(short_body, path):
    start = mark(short_body)
    with Client(short_body) as client:
        client.send(request(f"POST /{path} HTTP/1.1".encode(), b"Content-Length: 9", body=b"abc"))
        answers = client.answers()
    assert [(answer.status, answer.fields["connection"]) for answer in answers] == [(408, "close")]
    (record,) = records(short_body, start)
    assert (record["message"], record["client.address"]) == (f"POST /{path} 408", "127.0.0.1")


def test_upload_that_stops_amid_its_response_ends_that(short_body):
    start = mark(short_body)
    with Client(short_body) as client:
        client.send(request(b"POST /count/ HTTP/1.1", b"Content-Length: 9", body=b"abc"))
        assert client.head()[0] == 200
        assert client.file.read() == b"5\r\nbegun\r\n"
    warnings = [line for line in records(short_body, start) if line["level"] == "warning"]
    assert [(line["message"], line["client.address"]) for line in warnings] == [
        ("The body of a request did not end in time.", "127.0.0.1")
    ]


@pytest.mark.parametrize("before", [b"", GET], ids=["first", "later"])
def test_head_that_does_not_end_in_time_ends_the_connection(short_head, before):
    """Whether its bytes stop, or come one by one."""

    def drip(client: Client) -> None:
        with suppress(ConnectionError):
            client.send(b"GET /")
            while True:
                client.send(b"x")
                threading.Event().wait(0.05)

    start = mark(short_head)
    with ThreadPoolExecutor() as pool, Client(short_head) as silent, Client(short_head) as dripping:
        for client in (silent, dripping):
            client.send(before)
            assert not before or client.answer().status == 200
        silent.send(GET[:20])
        dripped = pool.submit(drip, dripping)
        assert silent.file.read() == b""
        with suppress(ConnectionResetError):
            assert dripping.file.read() == b""
        dripped.result(30)
    warnings = [line for line in records(short_head, start) if line["level"] == "warning"]
    message = "The head of a request did not end in time."
    assert [(line["message"], line["client.address"]) for line in warnings] == [(message, "127.0.0.1")] * 2


def test_half_a_head_ends_no_response_before_it(short_head):
    with Client(short_head) as client:
        client.send(b"GET /wait/long HTTP/1.1\r\nHost: a\r\n\r\n" + GET[:20])
        with Client(short_head) as other:  # which begins later, and whose time is over
            other.send(GET[:20])
            assert other.file.read() == b""
        get(short_head, "/open/long")
        assert client.statuses() == [200]


@pytest.mark.parametrize("before", [b"", GET, b"\r\n"], ids=["nothing", "a request", "an empty line"])
def test_idle_connection_ends_in_time_without_a_record(short_idle, before):
    start = mark(short_idle)
    with Client(short_idle) as client:
        client.send(before)
        assert client.statuses() == [200] * (before == GET)
    assert [line["message"] for line in records(short_idle, start)] == ["GET /items/5 200"] * (before == GET)


# --- A client that leaves ---


def test_client_that_leaves_amid_its_upload_is_a_499_and_no_error(patient):
    for number, path in enumerate(["size", "item"] * 2):
        count = len(patient.said(f"POST /{path} 499"))
        client = Client(patient)
        client.send(request(f"POST /{path} HTTP/1.1".encode(), b"Content-Length: 9", body=b"abc"))
        client.leave() if number > 1 else client.__exit__()
        patient.wait_for(f"POST /{path} 499", count + 1)


def test_client_that_leaves_amid_its_response_is_no_error(patient):
    for is_abrupt in (True, False):
        client = Client(patient)
        client.send(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        client.head()
        client.leave() if is_abrupt else client.__exit__()
    patient.wait_for("GET /endless 200", 2)


# --- WebSockets ---

HANDSHAKE = (
    b"Connection: Upgrade",
    b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13",
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
WS = b"GET /ws HTTP/1.1"


@pytest.mark.parametrize("fields", [(), (b"Content-Length: 0",)], ids=["no length", "a length of zero"])
def test_handshake_is_answered_and_a_client_that_leaves_its_websocket_is_no_error(sockets, fields):
    for is_abrupt in (True, False):
        client = Client(sockets)
        client.send(request(WS, *HANDSHAKE, *fields))
        assert client.head()[0] == 101
        client.send(b"\x81\x82\0\0\0\0hi")
        assert client.file.read(4) == b"\x81\x02hi"
        client.leave() if is_abrupt else client.__exit__()


@pytest.mark.parametrize("packets", [1, 2])
@pytest.mark.parametrize("body", ["a length", "chunks"])
def test_handshake_with_a_body_is_refused(sockets, body, packets):
    fields, data, _ = BODIES[body]
    head = request(WS, *HANDSHAKE, fields.removesuffix(b"\r\n"))
    with Client(sockets) as client:
        client.send(head + data) if packets == 1 else client.send(head, data)
        assert client.statuses() == [400]
    assert int(get(sockets, "/runs")) == 0


def test_handshake_does_not_come_before_the_response_to_an_earlier_request(sockets):
    with Client(sockets) as client:
        client.send(b"GET /wait/handshake HTTP/1.1\r\nHost: a\r\n\r\n" + request(WS, *HANDSHAKE))
        sockets.wait_for("Invalid HTTP request received.")
        get(sockets, "/open/handshake")
        assert client.statuses() == [200]


# --- Packets ---


def packets_received(client: Client) -> int:
    """tcpi_data_segs_in of Linux' tcp_info."""
    (count,) = struct.unpack_from("I", client.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160), 152)
    return count


def test_response_is_one_packet(patient):
    with Client(patient) as client:
        client.send(GET)
        client.answer()
        assert packets_received(client) == 1
        client.send(request(b"POST /size HTTP/1.1", b"Expect: 100-continue", b"Content-Length: 3"))
        assert client.head()[0] == 100
        client.send(b"abc")
        assert client.answer().body == b"3"
        assert packets_received(client) == 3


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_response_does_not_wait_for_a_background_task_that_blocks(source, tmp_path, method):
    for process in serve(source):
        with Client(process) as client:
            client.send(f"{method} /blocks-afterwards?file={tmp_path}/end HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            try:
                assert client.answer(has_body=method == "GET").status == 200
            finally:
                (tmp_path / "end").touch()


def test_first_piece_of_a_stream_does_not_wait_for_the_second(patient):
    with Client(patient) as client:
        client.send(b"GET /stream/second HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.head()[0] == 200
        assert client.chunk() == b"first\n"
        get(patient, "/open/second")
        assert client.chunk() == b"last\n"


@pytest.mark.parametrize("loop", ["auto", "asyncio"])
def test_stream_waits_for_a_client_that_does_not_read(source, loop):
    with Process("--loop", loop, source=source) as process, Client(process) as client:
        client.send(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        client.head()
        wait_until(lambda: get(process, "/made") == get(process, "/made"), 30)
        assert 0 < int(get(process, "/made")) < 100
