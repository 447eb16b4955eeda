"""What the stop promises: unready at once, serving through the drain, an end for what stays open."""

import asyncio
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.harness import Process, free_port, frozen, load, wait_until


@pytest.mark.parametrize(("workers", "kill"), [("1", os.kill), ("2", os.killpg)], ids=["a process", "a group"])
def test_sigterm_makes_unready_at_once_but_serves_through_the_drain(workers, kill):
    """A worker gets it twice where the whole group does, once from its parent."""
    with Process("--workers", workers, DRAIN_SECONDS="2") as process, httpx.Client(base_url=process.url) as open_one:
        process.wait_for("Application startup complete", int(workers))
        open_one.get("/")
        start = time.monotonic()
        kill(process.popen.pid, signal.SIGTERM)
        wait_until(lambda: httpx.get(process.url + "/readyz").status_code == 503)
        assert httpx.get(process.url + "/livez").status_code == 200
        last = open_one.get("/")
        assert (last.status_code, last.headers["connection"]) == (200, "close")
        assert httpx.get(process.url + "/").status_code == 200
        process.wait_for("GET /readyz 503")  # a probe that fails is worth a line
        process.end()
        assert time.monotonic() - start > 2
    assert len(process.said("Shutting down in 2 s")) == int(workers)
    assert len(process.said("Finished server process")) == int(workers)


def test_workers_of_uvicorns_own_command_drain_too_where_the_whole_group_gets_sigterm():
    port = str(free_port())
    command = (sys.executable, "-m", "uvicorn", "--app-dir")
    arguments = ("main:app", "--port", port, "--workers", "2")
    with Process(*arguments, command=command, source=frozen().parent, PORT=port, DRAIN_SECONDS="2") as process:
        process.wait_for("Application startup complete", 2)
        start = time.monotonic()
        os.killpg(process.popen.pid, signal.SIGTERM)
        process.end()
        assert time.monotonic() - start > 2


OWN_PROBE = """
from fastapi import APIRouter, HTTPException
checks = APIRouter()
answers = [200, 503]
@checks.get("/readyz")
async def ask_the_database() -> str:
    status = answers.pop(0)
    if status != 200:
        raise HTTPException(status)
    return "mine"
app.include_router(checks)
@app.get("/{path:path}")
async def read_any(path: str) -> str:
    return path
"""


def test_readiness_of_yours_answers_until_sigterm(variant):
    with (
        Process(source=variant(OWN_PROBE), DRAIN_SECONDS="60") as process,
        httpx.Client(base_url=process.url) as client,
    ):
        assert client.get("/readyz").json() == "mine"
        assert client.head("/readyz").status_code == 503
        assert client.get("/livez").content == b""  # a route of all paths takes no probe
        process.popen.terminate()
        wait_until(lambda: process.said("Shutting down in 60 s"))
        assert [httpx.get(process.url + path).status_code for path in ("/readyz", "/livez")] == [503, 200]
        assert httpx.get(process.url + "/readyz").content == b""


def test_readiness_of_yours_is_asked_by_probes_however_many_requests_there_are(variant):
    async def ask() -> list[int]:
        module = load(variant(OWN_PROBE))
        crowded = httpx.ASGITransport(module.Overload(module.app, requests=0, websockets=0))
        async with httpx.AsyncClient(transport=crowded, base_url="http://service") as client:
            return [(await client.get(path)).status_code for path in ("/", "/readyz")]

    assert asyncio.run(ask()) == [503, 200]


def test_second_sigterm_ends_the_drain():
    with Process(DRAIN_SECONDS="60") as process:
        process.popen.terminate()
        process.wait_for("Shutting down in 60 s")
        process.popen.terminate()
        assert process.end() == 0
    assert process.said("Finished server process")


def test_interrupt_from_the_keyboard_does_not_drain():
    with Process(DRAIN_SECONDS="60") as process:
        process.popen.send_signal(signal.SIGINT)
        process.end()
    assert process.said("Finished server process")


STREAM = """
from fastapi.responses import StreamingResponse
@app.get("/stream")
async def stream():
    async def chunks():
        while True:
            yield b"tick"
            await asyncio.sleep(0.1)
    return StreamingResponse(chunks())
"""
SLOW = """
@app.get("/slow")
async def slow() -> str:
    print("slow has begun")
    await asyncio.sleep(1)
    return "done"
"""


def test_request_in_flight_at_sigterm_finishes(variant):
    with Process(source=variant(SLOW), DRAIN_SECONDS="0") as process, ThreadPoolExecutor() as pool:
        response = pool.submit(httpx.get, process.url + "/slow")
        process.wait_for("slow has begun")
        process.terminate()
        assert response.result().json() == "done"
    assert process.said("GET /slow 200")


def test_open_stream_cannot_hold_the_stop(variant):
    process = Process(source=variant(STREAM), DRAIN_SECONDS="0", UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN="1")
    with process, httpx.stream("GET", process.url + "/stream") as response:
        chunks = response.iter_raw()
        assert next(chunks) == b"tick"
        start = time.monotonic()
        process.terminate()
        assert time.monotonic() - start >= 1
    assert process.said("timeout graceful shutdown exceeded")


STUCK = {
    "an import": "import time\nprint('it begins', flush=True)\ntime.sleep(3600)\n",
    "a lifespan that waits": """
@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    print("it begins")
    await asyncio.sleep(3600)
    yield
app.router.lifespan_context = lifespan
""",
    "a lifespan that blocks": """
@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    print("it begins")
    time.sleep(3600)
    yield
app.router.lifespan_context = lifespan
""",
}


@pytest.mark.parametrize("what", [*STUCK])
def test_sigterm_before_the_start_is_over_ends_at_once(variant, what):
    process = Process(source=variant(STUCK[what]), DRAIN_SECONDS="3600")
    process.wait_for("it begins")
    assert process.terminate() in {143, -signal.SIGTERM}
    assert not process.said("Traceback")
    assert not [line for line in process.lines if line.get("level") in {"error", "critical"}], process.lines


OWN_SIGNAL = """
import signal
@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    servers_own = signal.getsignal(signal.SIGTERM)
    def on_sigterm(number, frame):
        print("mine first")
        if CHAINS:
            servers_own(number, frame)
    signal.signal(signal.SIGTERM, on_sigterm)
    yield
    print("closed")
app.router.lifespan_context = lifespan
"""


def test_own_handler_of_sigterm_that_calls_the_one_before_it_begins_the_drain(variant):
    source = variant("CHAINS = True" + OWN_SIGNAL)
    with Process(source=source, DRAIN_SECONDS="3600") as process:
        process.popen.terminate()
        process.wait_for("Shutting down in 3600 s")
        assert httpx.get(process.url).status_code == 200
        process.terminate()
    assert len(process.said("mine first")) == 2
    assert process.said("closed")


def test_own_handler_of_sigterm_has_the_last_word(variant):
    with Process(source=variant("CHAINS = False" + OWN_SIGNAL), DRAIN_SECONDS="0") as process:
        process.popen.terminate()
        process.wait_for("mine first")
        assert httpx.get(process.url + "/readyz").status_code == 200


def test_child_of_the_service_ends_by_itself_and_the_service_serves_on(variant):
    source = variant("""
import logging, multiprocessing
def work() -> None:
    logging.getLogger("child").info("the child has worked")
def wait(begun) -> None:
    begun.set()
    time.sleep(3600)
@app.get("/work/{method}")
async def start_work(method: str) -> int:
    context = multiprocessing.get_context(method)
    process = context.Process(target=work)
    process.start()
    await asyncio.to_thread(process.join)
    return process.exitcode
@app.get("/wait/{method}")
async def start_wait(method: str) -> int:
    context = multiprocessing.get_context(method)
    begun = context.Event()
    process = context.Process(target=wait, args=(begun,))
    process.start()
    await asyncio.to_thread(begun.wait, 60)
    process.terminate()
    await asyncio.to_thread(process.join, 20)
    exitcode = process.exitcode
    process.kill()
    return exitcode
""")
    with Process(source=source, DRAIN_SECONDS="3600") as process:
        for count, method in enumerate(("fork", "spawn"), 1):
            assert httpx.get(f"{process.url}/work/{method}", timeout=60).json() == 0
            assert process.wait_for("the child has worked", count)["logger"] == "child"
            assert httpx.get(f"{process.url}/wait/{method}", timeout=60).json() == -signal.SIGTERM
        assert httpx.get(process.url + "/readyz").status_code == 200
    assert not process.said("Shutting down")


def test_sigterm_to_a_process_of_a_pool_ends_its_job_and_not_the_service(variant):
    source = variant("""
import multiprocessing, os
from concurrent.futures import ProcessPoolExecutor
def work() -> None:
    print(f"works in {os.getpid()}", flush=True)
    time.sleep(3600)
@app.get("/work")
async def start_work() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        await asyncio.get_running_loop().run_in_executor(pool, work)
""")
    with Process(source=source, DRAIN_SECONDS="3600") as process, ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.get, f"{process.url}/work", timeout=60)
        os.kill(int(process.wait_for("works in")["message"].split()[-1]), signal.SIGTERM)
        assert answer.result().status_code == 500
        assert httpx.get(process.url + "/readyz").status_code == 200


def test_steps_before_starting_that_are_interrupted_have_not_succeeded(variant):
    source = variant("""
import time
def prestart() -> None:
    print("begun")
    time.sleep(60)
""")
    process = Process("--prestart", source=source)
    process.wait_for("begun")
    assert process.terminate() == 128 + signal.SIGTERM
