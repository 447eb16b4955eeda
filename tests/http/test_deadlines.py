"""What clients get on the wire that are slow, or leave."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

from tests.harness import Process
from tests.http.wire import GET, Client, get, request


def test_upload_that_the_service_reads_slowly_is_whole(short_body, short_idle):
    data = request(b"POST /read-slowly HTTP/1.1", b"Content-Length: 1000000", body=bytes(1_000_000))
    with Client(short_body) as one, Client(short_idle) as other:
        one.send(data)
        other.send(data)
        assert [client.answer().body for client in (one, other)] == [b"1000000"] * 2


def test_upload_longer_than_each_deadline_is_whole_while_bytes_arrive(short_body, short_idle, short_head):
    def upload(process: Process) -> bytes:
        with Client(process) as client:
            head = request(b"POST /count/ HTTP/1.1", b"Content-Length: 12")
            client.send(*(bytes([byte]) for byte in head))
            client.head()
            client.chunk()
            for _ in range(12):
                threading.Event().wait(0.1)  # a client that sends slowly is what this is about
                client.send(b"x")
            return client.chunk()

    with ThreadPoolExecutor(3) as pool:
        assert [*pool.map(upload, (short_body, short_idle, short_head))] == [b"12"] * 3


def test_upload_that_stops_gets_a_408_and_the_end(short_body):
    """Whether the service reads it itself, or FastAPI for it."""
    start = short_body.mark()
    with Client(short_body) as one, Client(short_body) as other:
        for client, path in ((one, b"size"), (other, b"item")):
            client.send(request(b"POST /%s HTTP/1.1" % path, b"Content-Length: 9", body=b"abc"))
        answers = [client.answers() for client in (one, other)]
    assert [[(answer.status, answer.fields["connection"]) for answer in each] for each in answers] == [
        [(408, "close")]
    ] * 2
    records = {(record["message"], record["client.address"]) for record in short_body.since(start)}
    assert records == {("POST /size 408", "127.0.0.1"), ("POST /item 408", "127.0.0.1")}


def test_upload_that_stops_amid_its_response_ends_that(short_body):
    start = short_body.mark()
    with Client(short_body) as client:
        client.send(request(b"POST /count/ HTTP/1.1", b"Content-Length: 9", body=b"abc"))
        assert client.head()[0] == 200
        assert client.file.read() == b"5\r\nbegun\r\n"
    warnings = [line for line in short_body.since(start) if line["level"] == "warning"]
    assert [(line["message"], line["client.address"]) for line in warnings] == [
        ("The body of a request did not end in time.", "127.0.0.1")
    ]


def test_head_that_does_not_end_in_time_ends_the_connection(short_head):
    """Whether its bytes stop, or come one by one, and whether it is the first or a later one."""

    def drip(client: Client) -> None:
        with suppress(ConnectionError):
            client.send(b"GET /")
            while True:
                client.send(b"x")
                threading.Event().wait(0.05)

    start = short_head.mark()
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        silent, dripping = ([stack.enter_context(Client(short_head)) for _ in range(2)] for _ in range(2))
        for client in (silent[1], dripping[1]):
            client.send(GET)
            assert client.answer().status == 200
        dripped = pool.map(drip, dripping)
        for client in silent:
            client.send(GET[:20])
        for client in silent:
            assert client.file.read() == b""
        for client in dripping:
            with suppress(ConnectionResetError):
                assert client.file.read() == b""
        assert [*dripped] == [None] * 2
    warnings = [line for line in short_head.since(start) if line["level"] == "warning"]
    message = "The head of a request did not end in time."
    assert [(line["message"], line["client.address"]) for line in warnings] == [(message, "127.0.0.1")] * 4


def test_half_a_head_ends_no_response_before_it(short_head):
    with Client(short_head) as client:
        client.send(b"GET /wait/long HTTP/1.1\r\nHost: a\r\n\r\n" + GET[:20])
        with Client(short_head) as other:  # which begins later, and whose time is over
            other.send(GET[:20])
            assert other.file.read() == b""
        get(short_head, "/open/long")
        assert client.statuses() == [200]


def test_idle_connection_ends_in_time_without_a_record(short_idle, short_head):
    """A new one, whether nothing comes or an empty line, in the time of a head."""
    starts = short_idle.mark(), short_head.mark()
    with Client(short_idle) as used, Client(short_head) as silent, Client(short_head) as other:
        used.send(GET)
        other.send(b"\r\n")
        assert [client.statuses() for client in (used, silent, other)] == [[200], [], []]
    assert [line["message"] for line in short_idle.since(starts[0])] == ["GET /items/5 200"]
    assert short_head.since(starts[1]) == []


def test_new_connection_is_served_where_no_connection_is_kept():
    with Process("--timeout-keep-alive", "0", DRAIN_SECONDS="0") as process, Client(process) as client:
        for _ in range(3):
            assert get(process, "/items/5")
        client.send(GET)
        assert client.statuses() == [200]


def test_client_that_leaves_amid_its_upload_is_a_499_and_no_error(patient):
    for number, path in enumerate(["size", "item"] * 2):
        count = len(patient.said(f"POST /{path} 499"))
        client = Client(patient)
        client.send(request(f"POST /{path} HTTP/1.1".encode(), b"Content-Length: 9", body=b"abc"))
        client.leave() if number > 1 else client.__exit__()
        patient.wait_for(f"POST /{path} 499", count + 1)


def test_client_that_leaves_amid_its_response_is_no_error(patient):
    before = len(patient.said("GET /endless 200"))
    for is_abrupt in (True, False):
        client = Client(patient)
        client.send(b"GET /endless HTTP/1.1\r\nHost: a\r\n\r\n")
        client.head()
        client.leave() if is_abrupt else client.__exit__()
    patient.wait_for("GET /endless 200", before + 2)
