"""What clients get on the wire of WebSockets, of streams, and of responses in packets."""

import gc
import socket
import struct

import pytest

from tests.harness import Process, wait_until
from tests.http.wire import BODIES, GET, Client, get, refusals, request

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
    count = len(refusals(sockets.lines[: sockets.mark()]))
    with Client(sockets) as client:
        client.send(b"GET /wait/handshake HTTP/1.1\r\nHost: a\r\n\r\n" + request(WS, *HANDSHAKE))
        sockets.wait_for("Invalid HTTP request received.", count + 1)
        get(sockets, "/open/handshake")
        assert client.statuses() == [200]


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
def test_response_does_not_wait_for_a_background_task_that_blocks(patient, tmp_path, method):
    with Client(patient) as client:
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


def three_at_once(process: Process, path: str) -> list[int]:
    """What three requests are answered that wait for each other, in order of size."""
    clients = [Client(process) for _ in range(3)]
    for client in clients:
        client.send(f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode())
    found = []
    for client in clients:
        with client:
            found.append(int(client.answers()[0].body))
    return sorted(found)


def test_garbage_is_searched_for_less_while_several_responses_wait_and_then_as_usual(patient):
    usual = gc.get_threshold()[0]
    wait_until(lambda: int(get(patient, "/threshold")) == usual)
    assert three_at_once(patient, "/threshold/of-three") == [usual, usual, 5 * usual]
    wait_until(lambda: int(get(patient, "/threshold")) == usual)
    three_at_once(patient, "/threshold/of-three?another=3000")
    wait_until(lambda: int(get(patient, "/threshold")) == 3000)


@pytest.fixture(params=["uvloop", "asyncio"])
def loop(request, source, patient):
    """The service on each kind of event loop; the default is uvloop's."""
    if request.param == "uvloop":
        yield patient
        return
    with Process("--loop", request.param, source=source) as process:
        yield process


def test_stream_waits_for_a_client_that_does_not_read(loop):
    before = int(get(loop, "/made"))
    with Client(loop) as client:
        client.send(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        client.head()
        wait_until(lambda: get(loop, "/made") == get(loop, "/made"), 30)
        assert 0 < int(get(loop, "/made")) - before < 100


@pytest.mark.parametrize("waiting", [b"", GET], ids=["alone", "with another request behind it"])
def test_stream_ends_when_its_client_leaves(patient, waiting):
    client = Client(patient)
    client.send(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n" + waiting)
    client.head()
    assert int(get(patient, "/running")) > 0
    client.leave()
    wait_until(lambda: int(get(patient, "/running")) == 0, 30)
