"""What clients get on the wire, byte by byte: of requests that are whole, or odd."""

import pytest

from tests.http.wire import BODIES, GET, LAST, Client, get, request

UPGRADES = {
    "h2c, as Java's client": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n",
    "foo": b"Connection: keep-alive, Upgrade\r\nUpgrade: foo\r\n",
    "websocket without a package for it": b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
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
    "a body of chunks": (request(b"POST /size HTTP/1.1", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 200),
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
    start = patient.mark()
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
        refusals = [line for line in patient.since(start) if line["level"] == "warning"]
        assert [line["client.address"] for line in refusals] == ["127.0.0.1"]


def test_request_in_pieces_is_served(patient):
    data = request(b"POST /size HTTP/1.1", b"Connection: close", b"Content-Length: 3", body=b"abc")
    with Client(patient) as client:
        client.send(*(bytes([byte]) for byte in data))
        assert [answer.body for answer in client.answers()] == [b"3"]
