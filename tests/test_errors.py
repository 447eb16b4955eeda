"""What errors promise: an answer that says nothing of the inside, and a log that says all."""

import httpx
import pytest

from tests.harness import TRACEPARENT, answers


def test_exception_is_a_500_that_says_nothing_and_one_log_line_that_says_all(service):
    start = service.mark()
    response = httpx.get(service.url + "/broken", headers={"traceparent": TRACEPARENT})
    assert (response.status_code, response.json()) == (500, {"detail": "Internal Server Error"})
    assert response.headers["connection"] == "close"
    lines = service.since(start)
    (line,) = [line for line in lines if "exception.type" in line]
    (access,) = [line for line in lines if line["message"] == "GET /broken 500"]
    assert access["trace_id"] == line["trace_id"] == TRACEPARENT.split("-")[1]
    assert (line["level"], line["message"]) == ("error", "Exception in ASGI application")
    assert line["exception.type"] == "LookupError"
    assert 'raise LookupError("the secret inside")' in line["exception.stacktrace"]


def test_response_that_breaks_off_closes_the_connection(service):
    start = service.mark()
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(service.url + "/half")
    lines = service.since(start)
    assert [line["exception.type"] for line in lines if line["level"] == "error"] == ["LookupError"]
    assert [line["http.response.body.size"] for line in lines if line["message"] == "GET /half 200"] == [4]
    assert answers(service.url)
