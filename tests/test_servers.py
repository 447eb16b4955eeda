"""What each way to serve `main.app` keeps of the promises: the table in docs/servers.md, observed cell by cell."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import pytest

from tests.harness import HERE, TRACEPARENT, UV, Process, answers, free_port, wait_until, write_variant

TRACE = """
@app.get("/trace")
async def read_trace() -> str:
    return trace.format_trace_id(trace.get_current_span().get_span_context().trace_id)
"""
LIMIT = 1000  # bytes of a body
# Whatever runs there beside what the lock holds.
TOOL = (UV, "run", "--quiet", "--no-project")


def read_table() -> dict[str, dict[str, str]]:
    """For each row of the first table, what the document says of each server."""
    text = (HERE / "docs/servers.md").read_text()
    table = text[text.index("\n| |") :].strip().partition("\n\n")[0]
    lines = [line.strip("|").replace("`", "").split("|") for line in table.splitlines()]
    head, _, *rows = ([cell.strip() for cell in line] for line in lines)
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


TABLE = read_table()


def say(promise: bool) -> str:
    return "yes" if promise else "no"


def ask(client) -> dict[str, str]:
    """What the answers to a client show; the client is httpx's, or Starlette's for tests."""
    broken = client.get("/broken")
    sizes = [client.post("/size", content=bytes(size)).status_code for size in (LIMIT, LIMIT + 1)]
    first = client.get("/")
    return {
        "probes /livez, /readyz": say([client.get(path).status_code for path in ("/livez", "/readyz")] == [200, 200]),
        "headers of safety": say({"x-content-type-options", "content-security-policy"} <= first.headers.keys()),
        "an exception is a JSON 500": say(
            (broken.status_code, broken.text) == (500, '{"detail":"Internal Server Error"}')
        ),
        "413 beyond MAX_BODY_BYTES": say(sizes == [200, 413]),
        "trace ids of the caller": say(
            client.get("/trace", headers={"traceparent": TRACEPARENT}).json() == TRACEPARENT.split("-")[1]
        ),
    }


def observe(url: str, terminate: Callable[[], object], read_log: Callable[[], list[dict]]) -> dict[str, str]:
    """What a server that listens there keeps of each promise; `terminate` sends it SIGTERM twice."""
    many = {f"x-{number}": "1" for number in range(120)}
    with httpx.Client(base_url=url) as client:
        seen = ask(client)
        refused = client.get("/", headers=many).status_code == 400
        client.get("/items/5")
    terminate()
    wait_until(lambda: not answers(url, "/readyz"))
    drains = answers(url, "/livez")
    terminate()
    wait_until(lambda: not answers(url))
    lines = read_log()
    of_request = [line for line in lines if "GET /items/5" in line["message"]]
    assert len(of_request) < 2, of_request
    access = "no"
    if of_request:
        access = "yes" if "http.request.method" in of_request[0] else "its own line"
    return seen | {
        "access record": access,
        "drain on SIGTERM": say(drains),
        "JSON on stdout": say(all("level" in line for line in lines)),
        "limits of the protocol": say(refused),
    }


def observe_process(command: tuple[str | Path, ...], source: str, *arguments: str) -> dict[str, str]:
    """What a server keeps that this command starts; FOLDER and PORT stand for those of the service."""
    with TemporaryDirectory() as folder:
        write_variant(Path(folder) / "main.py", TRACE)
        port = str(free_port())
        process = Process(
            *(argument.replace("FOLDER", folder).replace("PORT", port) for argument in arguments),
            command=command,
            source=Path(folder) / source,
            PORT=port,
            VIRTUAL_ENV=sys.prefix,
            MAX_BODY_BYTES=str(LIMIT),
            DRAIN_SECONDS="60",
        )

        def read_log() -> list[dict]:
            process.end()
            return process.lines

        with process:
            return observe(process.url, process.popen.terminate, read_log)


# Runs beside Starlette's TestClient, which wants a package that the lock does not hold.
TESTED = """
import json, logging, sys
from main import app
from starlette.testclient import TestClient
from tests.test_servers import ask, say
records = []
handler = logging.Handler()
handler.emit = records.append
logging.getLogger("access").addHandler(handler)
logging.getLogger("access").setLevel("INFO")
with TestClient(app, raise_server_exceptions=False) as client:
    seen = ask(client)
    records.clear()
    client.get("/items/5")
    seen["access record"] = say([record.getMessage() for record in records] == ["GET /items/5 200"])
print(json.dumps(seen))
"""


def observe_test_client() -> dict[str, str]:
    with TemporaryDirectory() as folder:
        write_variant(Path(folder) / "main.py", TRACE)
        environment = {"VIRTUAL_ENV": sys.prefix, "PYTHONPATH": f"{folder}:{HERE}", "MAX_BODY_BYTES": str(LIMIT)}
        result = subprocess.run(
            [*TOOL, "--with", "httpx2", "python", "-c", TESTED],
            env=os.environ | environment,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stderr
    nothing_of_a_process = dict.fromkeys(("drain on SIGTERM", "JSON on stdout", "limits of the protocol"), "no")
    return json.loads(result.stdout.splitlines()[-1]) | nothing_of_a_process


UVICORN = (sys.executable, "-m", "uvicorn", "--app-dir")
FASTAPI = (*TOOL, "--with", "fastapi-cli", "fastapi", "run")
HYPERCORN = (*TOOL, "--with", "hypercorn", "hypercorn")
OBSERVERS: dict[str, Callable[[], dict[str, str]]] = {
    "python main.py": lambda: observe_process((sys.executable,), "main.py"),
    "uvicorn main:app": lambda: observe_process(UVICORN, "", "main:app", "--port", "PORT"),
    "fastapi run main.py": lambda: observe_process(FASTAPI, "main.py", "--host", "127.0.0.1", "--port", "PORT"),
    "hypercorn main:app": lambda: observe_process(HYPERCORN, "main:app", "--bind", "127.0.0.1:PORT"),
    "TestClient(app)": observe_test_client,
}


@cache
def seen(server: str) -> dict[str, str]:
    return OBSERVERS[server]()


@pytest.mark.parametrize(
    ("server", "promise"),
    [(server, promise) for server in OBSERVERS for promise in TABLE],
)
def test_server_keeps_of_each_promise_what_the_table_says(server, promise):
    assert seen(server)[promise] == TABLE[promise][server]
