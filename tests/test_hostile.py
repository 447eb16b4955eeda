"""What hostile clients get: an answer of the 4xx kind or the end of their connection, in time, while others are served."""

import asyncio
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import repeat
from urllib.parse import urlsplit

import httpx
import pytest

from tests.harness import UV, Container, run, wait_until

SCHEMATHESIS = "schemathesis@4.32.5"
SECONDS = 2  # for each of these
IN_TIME = tuple(
    f"--env={name}={SECONDS}"
    for name in ("TIMEOUT_KEEP_ALIVE", "CLIENT_HEADER_TIMEOUT", "CLIENT_BODY_TIMEOUT", "SEND_TIMEOUT")
)
GET = b"GET /items/5?q=somequery HTTP/1.1\r\nHost: test\r\n"
CHUNKED = b"POST /items/5 HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n"


@pytest.fixture(scope="module")
def container(image):
    with image.container(flags=IN_TIME) as container:
        yield container


def address(container: Container) -> tuple[str, int]:
    url = urlsplit(container.url)
    return url.hostname or "", url.port or 80


def connect(container: Container) -> socket.socket:
    return socket.create_connection(address(container), timeout=60)


def talk(container: Container, *data: bytes | Iterator[bytes]) -> tuple[list[int], float]:
    """The statuses of the answers to what is sent, and the seconds until the connection's end."""
    start, answers = time.monotonic(), b""
    with connect(container) as connection, ThreadPoolExecutor() as pool:

        def send() -> None:
            with suppress(OSError):
                for piece in data:
                    for part in [piece] if isinstance(piece, bytes) else piece:
                        connection.sendall(part)

        sent = pool.submit(send)
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answers += piece
        seconds = time.monotonic() - start
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)
        sent.result()
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answers)], seconds


def drip() -> Iterator[bytes]:
    for byte in GET:
        time.sleep(0.3)  # a client that is never idle for long
        yield bytes([byte])


CASES = {
    "100 header fields": ([GET, b"X: x\r\n" * 98, b"Connection: close\r\n\r\n"], [200]),
    "101 header fields": ([GET, b"X: x\r\n" * 99, b"Connection: close\r\n\r\n"], [400]),
    "a header of 60 KB": ([GET, b"X: ", b"x" * 60_000, b"\r\nConnection: close\r\n\r\n"], [200]),
    "a header of 1 MB": ([GET, b"X: ", b"x" * 2**20, b"\r\n\r\n"], [400]),
    "10,000 headers": ([GET, b"X: x\r\n" * 10_000, b"\r\n"], [400]),
    "a request line of 1 MB": ([b"GET /", b"x" * 2**20, b" HTTP/1.1\r\n\r\n"], [400]),
    "a header without end": ([GET, b"X: ", repeat(b"x" * 65536)], [400]),
    "Transfer-Encoding with Content-Length": ([CHUNKED, b"Content-Length: 3\r\n\r\n0\r\n\r\n"], [400]),
    "more than announced": ([GET, b"Content-Length: 3\r\n\r\nabcdefgh"], [200]),
    "a null byte in the path": ([b"GET /items/\0 HTTP/1.1\r\nHost: test\r\n\r\n"], [400]),
    "a null byte in a header": ([GET, b"X: a\0b\r\n\r\n"], [400]),
    "invalid UTF-8 in the path": ([b"GET /items/\xff HTTP/1.1\r\nHost: test\r\n\r\n"], [400]),
    "invalid UTF-8 in the query": ([b"GET /items/5?q=\xff HTTP/1.1\r\nHost: test\r\n\r\n"], [400]),
    "an escape in the path that is not UTF-8": (
        [b"GET /items/%ff HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"],
        [422],
    ),
    "an escape in the query that is not UTF-8": (
        [b"GET /items/5?q=%C3 HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"],
        [200],
    ),
    "an escaped null byte in the path": (
        [b"GET /items/%00 HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"],
        [422],
    ),
    "an escape that is none": ([b"GET /items/%zz HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"], [422]),
    "an integer of 10,000 digits": ([b"GET /items/", b"9" * 10_000, b" HTTP/1.1\r\nHost: test\r\n\r\n"], [422]),
    "random bytes": ([bytes(range(256)) * 4], [400]),
    "TLS": ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(502)], [400]),
    "CONNECT": ([b"CONNECT test:80 HTTP/1.1\r\nHost: test\r\n\r\n"], [400]),
    "silence": ([], []),
    "half a head, then silence": ([GET], []),
    "half a head, byte by byte": ([drip()], []),
    "half a body, then silence": ([b"POST /items/5 HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n\r\nabc"], [405]),
    "a body without end": ([CHUNKED, b"\r\n", repeat(b"10000\r\n" + b"x" * 65536 + b"\r\n")], [405]),
    "a trailer without end": ([CHUNKED, b"\r\n0\r\nX: ", repeat(b"x" * 65536)], [405]),
    "trailers without end": ([CHUNKED, b"\r\n0\r\n", repeat(b"X: x\r\n" * 1000)], [405]),
    "an empty line after an answer, then silence": ([GET, b"\r\n", b"\r\n"], [200]),
}


@pytest.mark.parametrize(("data", "statuses"), CASES.values(), ids=CASES)
def test_client_gets_a_refusal_or_its_end_in_time(container, data, statuses):
    answers, seconds = talk(container, *data)
    assert answers == statuses
    assert seconds < SECONDS + 2  # the second for a machine that is busy


def test_requests_in_a_pipeline_are_answered_in_order_and_those_beyond_100_are_not(container):
    requests = [b"GET /items/%d HTTP/1.1\r\nHost: test\r\n\r\n" % number for number in range(10_000)]
    with connect(container) as connection, connection.makefile("rb") as answers:
        connection.sendall(b"".join(requests))
        found = re.findall(rb'"item_id":(\d+)', answers.read())
    assert len(found) > 100
    assert found == [b"%d" % number for number in range(len(found))]


def test_slow_clients_keep_nobody_from_being_served_and_are_closed_in_time(container):
    with ExitStack() as stack, httpx.Client(base_url=container.url) as client:
        slow = [stack.enter_context(connect(container)) for _ in range(500)]
        for connection in slow:
            connection.sendall(GET)
        assert [client.get("/items/5").status_code for _ in range(200)] == [200] * 200
        assert [connection.recv(1) for connection in slow] == [b""] * 500


def state(container: Container) -> tuple[int, float]:
    """Open descriptors, and megabytes resident."""
    code = "import os; print(len(os.listdir('/proc/1/fd')), open('/proc/1/status').read())"
    descriptors, status = container.python_says(code).split(" ", 1)
    return int(descriptors), int(status.partition("VmRSS:")[2].split()[0]) / 1000


def test_clients_that_do_not_read_are_closed_in_time(image):
    with image.container(flags=IN_TIME) as container, ExitStack() as stack:
        before, _ = state(container)
        for _ in range(20):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(address(container))
            connection.sendall(b"GET /static-offline-docs/redoc.standalone.js HTTP/1.1\r\nHost: test\r\n\r\n")
        wait_until(lambda: state(container)[0] >= before + 20)
        wait_until(lambda: state(container)[0] <= before)


def test_hostile_clients_leave_nothing_behind(image):
    """All of the above at once, again and again: soon an attack takes no memory that the one before it has not taken."""

    def attack() -> None:
        with ThreadPoolExecutor(50) as pool:
            pieces = [data for data, _ in CASES.values() if all(isinstance(piece, bytes) for piece in data)]
            [*pool.map(lambda data: talk(container, *data), pieces * 5)]
            [*pool.map(lambda _: talk(container, GET, b"X: ", repeat(b"x" * 65536)), range(50))]
            [*pool.map(lambda _: talk(container, CHUNKED, b"\r\n", repeat(b"4\r\nbody\r\n" * 1000)), range(4))]

    with image.container(flags=IN_TIME) as container:
        httpx.get(f"{container.url}/docs")
        open_before, at_start = state(container)
        resident = [at_start]

        def no_more_is_taken() -> bool:
            attack()
            wait_until(lambda: state(container)[0] <= open_before)
            resident.append(state(container)[1])
            print("MB resident at the start, and after each attack:", *resident)
            return resident[-1] < resident[-2] + 0.25

        # A request that stays takes 10 KB at least, and each attack has hundreds.
        assert any(no_more_is_taken() for _ in range(8))
        assert (container.inspect("State.Running"), container.inspect("State.OOMKilled")) == (True, False)
        assert not [line for line in container.logs() if line["level"] in {"error", "critical"}]


def test_schemathesis_finds_nothing(image, tmp_path):
    """All of its checks, of what the schema describes and of what it does not."""
    with image.container(flags=("--memory=128m",)) as container:
        options = "--checks all --max-examples 2000 --workers 2 --seed 1 --no-color"
        command = f"{UV} tool run {SCHEMATHESIS} run {container.url}/openapi.json {options}"
        result = re.search(r"(\d+) generated, (\d+) passed", run(*command.split(), cwd=tmp_path))
        assert result
        assert int(result[1]) == int(result[2]) >= 2000
        assert not [line for line in container.logs() if line["level"] == "error"]


SLOW = """
import asyncio, signal
is_over = asyncio.Event()
@app.get("/slow")
async def slow() -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, is_over.set)
    await is_over.wait()
"""


async def burst(url: str, path: str, count: int) -> list[tuple[int, bytes]]:
    """As many requests at the same time, each on its own connection: statuses and heads of the answers."""
    address = urlsplit(url)
    connections = await asyncio.gather(*(asyncio.open_connection(address.hostname, address.port) for _ in range(count)))
    for _, writer in connections:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> tuple[int, bytes]:
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
        return int(head.split()[1]), head

    return await asyncio.gather(*(answer(*connection) for connection in connections))


def test_more_requests_than_a_process_serves_at_once_are_refused_meanwhile_and_probes_are_not(image, variant):
    async def overload() -> tuple[list[tuple[int, bytes]], list[tuple[int, bytes]]]:
        idle = [await asyncio.open_connection(*address(container)) for _ in range(100)]
        slow = asyncio.create_task(burst(container.url, "/slow", 100))
        await asyncio.to_thread(wait_until, lambda: len(container.said("GET /slow 503")) == 80)
        probes = [(await burst(container.url, path, 1))[0] for path in ("/livez", "/readyz")]
        run(image.engine, "kill", "--signal=USR1", container.id)
        answers = await slow
        for _, writer in idle:
            writer.close()
        return answers, probes

    with image.variant(variant(SLOW)).container(flags=("--env=MAX_CONCURRENCY=20",)) as container:
        answers, probes = asyncio.run(overload())
        refused = [head for status, head in answers if status == 503]
        assert (len(refused), {status for status, _ in answers}) == (80, {200, 503})
        assert all(b"\r\nretry-after: 1\r\n" in head for head in refused)
        assert [status for status, _ in probes] == [200] * 2
        assert httpx.get(f"{container.url}/items/5").status_code == 200


def test_request_after_a_long_pause_has_all_of_its_time(container):
    """Since who closes first loses requests."""

    def pieces() -> Iterator[bytes]:
        for piece in (GET + b"\r\n", GET, b"Connection: close\r\n\r\n"):
            yield piece
            time.sleep(SECONDS * 0.6)  # within the time for which a connection may be idle, and that of a request

    assert talk(container, pieces())[0] == [200, 200]
