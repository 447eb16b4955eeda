"""What the log promises: one JSON object a line, one access line a request, ids of traces."""

import os
import pty
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.harness import Process, frozen, wait_until, write_variant

SAYING = """
import logging, threading, warnings
class Shy:
    def __repr__(self):
        raise LookupError("no repr")
@app.get("/say")
async def say():
    warnings.warn("mind this")
    shop = logging.getLogger("shop")
    shop.info("sold %d", 3, extra={"customer": "x", "share": float("nan")})
    shop.info("%d", "no number")
    shop.info("shy", extra={"shy": Shy()})
    shop.info("half a pair: \\ud83d")
    circle = {}
    circle["circle"] = circle
    shop.info("trace me", extra={"level": "none", "timestamp": "never"}, stack_info=True)
    shop.info("odd", extra={"circle": circle, "raw": b"\\xff", "half": "\\ud83d"})
    threading.Thread(target=lambda: 1 / 0).start()
    raise LookupError("half a pair: \\ud83d")
@app.get("/long")
def say_long() -> None:
    def say_often(letter: str) -> None:
        for _ in range(50):
            logging.getLogger("long").info(letter * 9000)
    threads = [threading.Thread(target=say_often, args=letter) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


@pytest.fixture(scope="module")
def over(tmp_path_factory):
    """A service that has said all that, and has ended."""
    source = write_variant(tmp_path_factory.mktemp("log") / "main.py", SAYING)
    with Process(source=source, DRAIN_SECONDS="0") as process:
        httpx.get(process.url + "/say")
        httpx.get(process.url + "/long", timeout=60)
        process.terminate()
    return process


def test_every_line_is_json_from_the_first_to_the_last(over):
    stamp = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00")  # RFC 3339, in UTC
    assert all(stamp.fullmatch(line["timestamp"]) and line["level"] and line["message"] for line in over.lines)
    assert over.said("mind this")[0]["level"] == "warning"
    assert over.said("trace me")[0]["level"] == "info"
    assert "Stack" in over.said("trace me")[0]["code.stacktrace"]
    for odd in ("b'\\xff'", "\\ud83d", "{'circle': {...}}"):  # what is no JSON is shown all the same
        assert odd in over.said("odd")[0].values()
    assert all(line["message"] == line["message"].strip() for line in over.lines)
    assert over.said("sold 3")[0]["customer"] == "x"
    assert over.said("sold 3")[0]["share"] == "NaN"
    assert "'%d' at /" in over.said("Cannot log")[0]["message"]
    assert "no repr" in over.said("shy")[0]["shy"]
    assert over.said("half a pair: \\ud83d")
    (broken,) = over.said("Exception in ASGI application")
    assert broken["exception.stacktrace"].endswith("LookupError: half a pair: \\ud83d")
    assert [line["exception.type"] for line in over.said("Uncaught exception")] == ["ZeroDivisionError"]
    assert over.lines[-1]["message"].startswith("Finished server process")


def test_lines_of_several_threads_stay_whole(over):
    said = [line["message"] for line in over.lines if line["logger"] == "long"]
    assert [said.count(letter * 9000) for letter in "ab"] == [50, 50]


BURST = """
@app.get("/burst")
def burst() -> None:
    for _ in range(20):
        logging.getLogger("burst").info(f"{os.getpid()} " + "x" * 9000)
"""


def test_lines_of_several_workers_stay_whole(variant):
    def workers() -> set[str]:
        return {line["message"].split()[0] for line in process.lines if line.get("logger") == "burst"}

    def ask(_) -> None:
        for _ in range(10):
            httpx.get(process.url + "/burst")

    def both_have_written() -> bool:
        [*pool.map(ask, range(2))]
        return len(workers()) == 2

    with Process(source=variant(BURST), WEB_CONCURRENCY="2") as process, ThreadPoolExecutor() as pool:
        wait_until(both_have_written)
        assert [line for line in process.lines if "level" not in line] == []


def test_import_that_fails_ends_the_start_with_pythons_traceback(variant):
    process = Process(source=variant("import nonsense"))
    assert process.end() == 1
    assert process.lines[-1]["message"] == "ModuleNotFoundError: No module named 'nonsense'"


def test_error_in_a_step_before_starting_is_one_line_with_its_traceback(variant):
    process = Process("--prestart", source=variant('def prestart():\n    raise OSError("no database")'))
    assert process.end() == 1
    (line,) = process.lines
    assert (line["level"], line["exception.type"]) == ("critical", "OSError")


LIFESPAN = """
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from fastapi import FastAPI
"""


@pytest.mark.parametrize("workers", ["1", "2"])
def test_lifespan_error_ends_the_start(variant, workers):
    code = """
@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    raise OSError("no database")
    yield
app.router.lifespan_context = lifespan
"""
    process = Process("--workers", workers, "--timeout-worker-healthcheck=2", source=variant(LIFESPAN + code))
    assert process.end() == (3 if workers == "1" else 0)  # as by `uvicorn --workers`
    assert process.said("no database")


def test_terminal_gets_uvicorns_own_lines():
    keyboard, screen = pty.openpty()
    command = [sys.executable, frozen(), "--port", "0"]
    with subprocess.Popen(command, stdin=screen, stdout=screen, stderr=screen) as popen:
        os.close(screen)
        text = ""
        with open(keyboard, errors="replace", newline="") as lines:
            for line in lines:
                text += line
                if url := re.search(r"http://127\.0\.0\.1:\d+", line):
                    httpx.get(url[0] + "/livez")
                    httpx.get(url[0] + "/items/5")
                if "/items/5" in line:
                    break
        popen.kill()
    assert "\x1b[32mINFO\x1b[0m" in text
    assert "GET /items/5 200" in text
    assert "/livez" not in text
    assert "{" not in text


def test_log_reader_that_is_gone_stops_no_service():
    reader, writer = os.pipe()
    with Process(output=writer) as process:
        os.close(writer)
        os.close(reader)
        assert [httpx.get(process.url).status_code for _ in range(3)] == [200] * 3


def test_closed_output_stops_no_service():
    command = ("sh", "-c", 'exec "$0" "$@" >&-', sys.executable)
    with Process(command=command) as process:
        assert httpx.get(process.url).status_code == 200


OUTPUT = """
import contextlib, faulthandler, io, subprocess, sys
faulthandler.enable()
@app.get("/output")
def output() -> str:
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        print("printed")
        print("caught", file=sys.stderr)
    with contextlib.redirect_stdout(io.StringIO()) as text:
        print("redirected")
        logging.getLogger("shop").info("logged meanwhile")
    subprocess.run(["echo", "said by a child"], stdout=sys.stdout, stderr=sys.stderr, check=True)
    return errors.getvalue() + text.getvalue()
@app.get("/print")
async def say() -> None:
    print("a", 1)
"""


def test_stdout_is_stdout(variant):
    with Process(source=variant(OUTPUT)) as process:
        assert httpx.get(process.url + "/output").json() == "caught\nredirected\n"
        process.wait_for("GET /output 200")
        assert [len(process.said(text)) for text in ("printed", "said by a child", "logged meanwhile")] == [1, 1, 1]
        assert not process.said("redirected")
        httpx.get(process.url + "/print")
        assert process.wait_for("a 1") == {"message": "a 1"}


REPLACED = """
import sys
class Tee:
    def __init__(self, stream):
        self.stream = stream
    def write(self, text):
        return self.stream.write(text.upper())
    def flush(self):
        self.stream.flush()
sys.stdout = Tee(sys.stdout)
@app.get("/print")
async def say() -> None:
    print("loud")
"""


def test_stdout_that_is_replaced_takes_what_is_printed_and_leaves_the_log_as_it_is(variant):
    with Process(source=variant(REPLACED)) as process:
        httpx.get(process.url + "/print")
        process.wait_for("LOUD")
        assert process.wait_for("GET /print 200")["level"] == "info"


TAKEN_OVER = """
import logging, logging.config, warnings
@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    {in_lifespan}
    yield
app.router.lifespan_context = lifespan
{at_import}
@app.get("/say")
async def say() -> None:
    logging.getLogger("shop").warning("sold")
    warnings.warn("mind this")
"""


DICT = "logging.config.dictConfig(dict(version=1, root=dict(level='INFO')))"


BASIC = "logging.basicConfig(force=True, level='DEBUG', format='mine %(message)s')"


WARNINGS = "warnings.simplefilter('always')"


@pytest.mark.parametrize(
    ("at_import", "in_lifespan", "falls"),
    [
        (f"{DICT}; {BASIC}; {WARNINGS}", WARNINGS, set()),
        ("", BASIC, {"sold", "mind this"}),
        ("", DICT, {"sold", "mind this", "GET /say 200"}),
    ],
)
def test_log_stands_what_a_library_does_to_it_at_import_and_names_what_falls_later(
    variant, at_import, in_lifespan, falls
):
    source = variant(TAKEN_OVER.format(at_import=at_import, in_lifespan=in_lifespan))
    with Process(source=source, DRAIN_SECONDS="0") as process:
        httpx.get(process.url + "/say")
        process.terminate()
    whole = {
        text
        for text in ("sold", "mind this", "GET /say 200")
        if [line for line in process.said(text) if "level" in line]
    }
    assert whole == {"sold", "mind this", "GET /say 200"} - falls


def test_unexpected_exception_out_of_the_server_is_logged_with_its_traceback():
    process = Process("--fd", "999")
    assert process.end() == 1
    line = process.lines[-1]
    assert (line["level"], line["exception.type"]) == ("critical", "OSError")
    assert "PORT" not in line["message"]


def test_what_a_service_logs_has_its_line_whatever_its_exception_is(variant):
    """One of a client that has left, which uvicorn's own record lacks; and one of a class that does not tell its name."""
    source = variant("""
import logging
from fastapi import WebSocketDisconnect

class Nameless(type):
    def __getattribute__(cls, name):
        if name == "__qualname__":
            raise LookupError(name)
        return super().__getattribute__(name)

class Odd(Exception, metaclass=Nameless):
    pass

@app.get("/log")
async def log() -> None:
    logging.getLogger("shop").error("left", exc_info=WebSocketDisconnect())
    logging.getLogger("shop").error("odd", exc_info=Odd("strange"))
    logging.getLogger("shop").warning("kept", extra={"level": 3})
""")
    with Process(source=source) as process:
        assert httpx.get(process.url + "/log").status_code == 200
        assert process.wait_for("left")["exception.type"] == "WebSocketDisconnect"
        assert "strange" in process.wait_for("odd")["exception.stacktrace"]
        kept = process.wait_for("kept")
        assert (kept["level"], kept["extra.level"]) == ("warning", 3)
