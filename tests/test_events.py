"""What the stop promises an event stream, which has no end of its own."""

import signal
from typing import Any

import httpx
import pytest

from tests.harness import MIDDLEWARE, Process

EVENTS = """
from fastapi import Request
from fastapi.responses import StreamingResponse
@app.get("/events")
async def events():
    async def tell():
        try:
            while True:
                yield "data: tick\\n\\n"
                await asyncio.sleep(0.05)
        finally:
            print("events are over")
    return StreamingResponse(tell(), media_type="text/event-stream")
"""


@pytest.mark.parametrize(
    ("workers", "code", "number"),
    [
        pytest.param("1", MIDDLEWARE + EVENTS, signal.SIGTERM, id="below own middleware"),
        pytest.param("2", EVENTS, signal.SIGTERM, id="with workers"),
        pytest.param("1", EVENTS, signal.SIGINT, id="by Ctrl+C"),
    ],
)
def test_event_stream_ends_by_itself_at_the_stop_and_its_client_sees_a_whole_response(variant, workers, code, number):
    limits: dict[str, Any] = {"DRAIN_SECONDS": "0", "TIMEOUT_GRACEFUL_SHUTDOWN": "20"}
    with Process("--workers", workers, source=variant(code), **limits) as process:
        process.wait_for("Application startup complete", int(workers))
        with httpx.stream("GET", process.url + "/events", timeout=20) as response:
            ticks = response.iter_text()
            first = next(ticks)
            process.popen.send_signal(number)
            assert {*(first + "".join(ticks)).split("\n\n")} == {"data: tick", ""}
        process.end()
    assert process.said("events are over")
    assert process.said("GET /events 200")
    assert not process.said("timeout graceful shutdown exceeded")
    assert not process.said("Exception")


AFTER_EVENTS = """
import pathlib
from fastapi import BackgroundTasks
from fastapi.responses import StreamingResponse
@app.get("/events")
async def events(file: str, tasks: BackgroundTasks):
    async def save():
        while not pathlib.Path(file).exists():
            await asyncio.sleep(0.01)
        print("saved")
    tasks.add_task(save)
    return StreamingResponse(["data: tick\\n\\n"], media_type="text/event-stream")
"""


def test_background_task_of_an_event_stream_that_has_ended_gets_the_time_of_any_other(variant, tmp_path):
    limits: dict[str, Any] = {"DRAIN_SECONDS": "0", "TIMEOUT_GRACEFUL_SHUTDOWN": "20"}
    with Process(source=variant(AFTER_EVENTS), **limits) as process:
        assert httpx.get(f"{process.url}/events?file={tmp_path}/end").text == "data: tick\n\n"
        process.popen.terminate()
        process.wait_for("Waiting for background tasks to complete")
        (tmp_path / "end").touch()
        process.end()
    assert process.said("saved")
