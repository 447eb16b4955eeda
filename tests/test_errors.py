"""What errors promise: an answer that says nothing of the inside, and a log that says all."""

import httpx
import pytest

from tests.harness import TRACEPARENT, Process, answers


def test_exception_is_a_500_that_says_nothing_and_one_log_line_that_says_all(variant):
    source = variant("""
@app.get("/broken")
async def broken():
    raise LookupError("the secret inside \\ud83d")
""")
    with Process(source=source) as process, httpx.Client(base_url=process.url) as client:
        response = client.get("/broken", headers={"traceparent": TRACEPARENT})
        assert (response.status_code, response.json()) == (500, {"detail": "Internal Server Error"})
        assert response.headers["connection"] == "close"
        line = process.wait_for("Exception in ASGI application")
        assert [line for line in process.lines if "exception.type" in line] == [line]
        assert process.wait_for("GET /broken 500")["trace_id"] == line["trace_id"] == TRACEPARENT.split("-")[1]
    assert (line["level"], line["exception.type"]) == ("error", "LookupError")
    assert 'raise LookupError("the secret inside \\ud83d")' in line["exception.stacktrace"]


HALF = """
from fastapi.responses import StreamingResponse
@app.get("/half")
async def half():
    async def chunks():
        yield b"half"
        raise LookupError
    return StreamingResponse(chunks())
"""


def test_response_that_breaks_off_closes_the_connection(variant):
    with Process(source=variant(HALF)) as process:
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(process.url + "/half")
        process.wait_for("Exception in ASGI application")
        assert process.wait_for("GET /half 200")["http.response.body.size"] == 4
        assert answers(process.url)


def test_body_over_the_limit_is_a_413(variant):
    source = variant("""
from typing import Annotated
from fastapi import Body
@app.post("/size")
async def size(body: Annotated[bytes, Body()]) -> int:
    return len(body)
""")
    with Process(source=source, MAX_BODY_BYTES="1000") as process:
        post = f"{process.url}/size"
        assert httpx.post(post, content=b"x" * 1000).json() == 1000
        assert httpx.post(post, content=b"x" * 1001).status_code == 413
        assert httpx.post(post, content=iter([b"x" * 600] * 2)).status_code == 413  # chunked, no length announced
