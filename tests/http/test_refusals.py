"""What clients get on the wire, byte by byte: of requests that are too large, or broken off in the midst of others."""

import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import trustme

from tests.harness import Process, wait_until
from tests.http.wire import GET, PATIENT, SMUGGLED, Answer, Client, get, refusals, request


def test_body_over_the_limit_gets_one_whole_413_and_its_neighbours_their_answers(patient):
    """A client that sends all of its 2 MB first, and then reads; others on connections that they use again."""
    lengths = request(b"POST /size HTTP/1.1", b"Content-Length: 2000000", body=b"x" * 2_000_000)
    piece = b"%x\r\n%s\r\n" % (100_000, b"x" * 100_000)
    chunks = request(b"POST /size HTTP/1.1", b"Transfer-Encoding: chunked", body=piece * 20 + b"0\r\n\r\n")
    start, is_over = patient.mark(), threading.Event()

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
    assert {line["level"] for line in patient.since(start)} == {"info"}


REFUSED_UPLOADS = {
    "over the limit": (request(b"POST /size HTTP/1.1", b"Content-Length: 1000000000"), 413),
    "without a host": (request(b"POST /size HTTP/1.1", b"Content-Length: 1000000000", host=False), 400),
    "with a bad chunk": (request(b"POST /size HTTP/1.1", b"Transfer-Encoding: chunked", body=b"x\r\n"), 400),
}


def test_client_that_goes_on_sending_after_its_refusal_is_ended_in_time(short_idle):
    def send_until_the_end(client: Client) -> None:
        with suppress(ConnectionError):
            while True:
                client.send(bytes(1000))

    def upload(head: bytes) -> list[int]:
        with ThreadPoolExecutor() as pool, Client(short_idle) as client:
            client.send(head)
            sent = pool.submit(send_until_the_end, client)
            statuses = client.statuses()
            sent.result(30)
        return statuses

    start = short_idle.mark()
    heads, expected = zip(*REFUSED_UPLOADS.values(), strict=True)
    with ThreadPoolExecutor() as pool:
        assert [*pool.map(upload, heads)] == [[status] for status in expected]
    assert len([line for line in short_idle.since(start) if line["level"] == "warning"]) == expected.count(400)


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
    start, runs = patient.mark(), int(get(patient, "/runs"))
    name = f"{path}-{[*BAD].index(bad)}"
    with Client(patient) as client:
        client.send(f"GET /{path}/{name} HTTP/1.1\r\nHost: a\r\n\r\n".encode(), GET + BAD[bad])
        patient.wait_for("Invalid HTTP request received.", 1 + len(refusals(patient.lines[:start])))
        get(patient, f"/open/{name}")
        assert client.statuses() == [200, 200]
    assert len(refusals(patient.since(start))) == 1
    assert int(get(patient, "/runs")) == runs


def test_refusal_names_its_cause_after_an_upgrade_that_was_not_taken_as_well(patient):
    """The request that asks for another protocol is read a second time, and what follows it with it."""
    plain = request(b"GET /items/5 HTTP/1.1")
    upgrade = request(b"GET /items/5 HTTP/1.1", b"Connection: Upgrade", b"Upgrade: foo")
    start = patient.mark()
    for head in (plain, upgrade):
        with Client(patient) as client:
            client.send(head + b"nonsense\r\n\r\n")
            assert client.statuses() == [200]
    first, second = refusals(patient.since(start))
    assert first["cause"] == second["cause"] != ""


@pytest.mark.parametrize("line", ["POST /size", "POST /nowhere", "GET /livez"])
def test_refusal_amid_a_body_is_logged_as_the_400_that_its_client_got(patient, line):
    """Whether the service reads it, has another answer without it, or it is a probe."""
    count = len(patient.said(f"{line} 400"))
    with Client(patient) as client:
        client.send(request(f"{line} HTTP/1.1".encode(), b"Transfer-Encoding: chunked", body=b"x\r\n"))
        assert client.statuses() == [400]
    assert patient.wait_for(f"{line} 400", count + 1)["http.response.body.size"] == 0


def test_bad_chunk_amid_the_response_to_it_ends_that(patient):
    with Client(patient) as client:
        client.send(request(b"POST /count/ HTTP/1.1", b"Transfer-Encoding: chunked"))
        assert client.head()[0] == 200
        assert client.chunk() == b"begun"
        client.send(b"x\r\n")
        assert client.file.read() == b""


@pytest.fixture(scope="module")
def with_tls(source, tmp_path_factory):
    """The service with TLS, and what trusts its certificate."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "both.pem")
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    files = (f"--ssl-certfile={folder}/both.pem", f"--ssl-keyfile={folder}/both.pem")
    process = Process(*files, source=source, **PATIENT)
    try:
        process.wait_for("Uvicorn running on")
        yield process, trust
    finally:
        process.__exit__()


def test_bad_chunk_with_tls_ends_its_response_at_once(with_tls):
    process, trust = with_tls
    with Client(process, trust) as client:
        client.send(request(b"POST /count/ HTTP/1.1", b"Transfer-Encoding: chunked"))
        assert client.head()[0] == 200
        assert client.chunk() == b"begun"
        client.send(b"x\r\n")
        assert client.file.read() == b""


@pytest.mark.parametrize("first", [b"", GET], ids=["alone", "in a pipeline"])
def test_client_that_stays_after_its_refusal_cannot_hold_the_stop(source, first):
    bad = request(b"POST /item HTTP/1.1", b"Transfer-Encoding: chunked", body=b"x\r\n")
    limits = {"DRAIN_SECONDS": "0", "TIMEOUT_GRACEFUL_SHUTDOWN": "3600"}
    with Process(source=source, **PATIENT, **limits) as process, Client(process) as client:
        client.send(first + bad)
        assert client.head()[0] == (200 if first else 400)
        process.mark()
        process.popen.terminate()
        process.end()
    assert not process.said("timeout graceful shutdown exceeded")


def test_refusal_that_is_read_in_the_turn_of_a_response_comes_after_it(patient, tmp_path):
    with Client(patient) as client:
        client.send(f"GET /blocks?file={tmp_path}/end HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        wait_until((tmp_path / "end.begun").exists)
        client.send(request(b"POST /item HTTP/1.1", b"Transfer-Encoding: chunked", body=b"x\r\n"))
        (tmp_path / "end").touch()
        assert client.statuses() == [200, 400]


def test_refusal_right_behind_a_response_is_no_second_one_and_loses_no_first(patient):
    trailers = b"0\r\n" + b"X: x\r\n" * 100_000
    for _ in range(10):
        with Client(patient) as client:
            client.send(request(b"POST /items/5 HTTP/1.1", b"Transfer-Encoding: chunked"), trailers)
            assert client.statuses() in ([400], [405])


def test_more_requests_than_100_before_their_answers_end_the_connection_after_those(patient):
    with Client(patient) as client:
        count = len(refusals(patient.lines[: patient.mark()]))
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
