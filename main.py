# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi", "fastapi-offline", "httptools", "httpx", "uvicorn", "uvloop; sys_platform != 'win32'"]
# ///
"""A FastAPI service in one file. The part headed "The service" is yours; the rest makes it at home in a container."""

import asyncio
import faulthandler
import io
import logging.config
import multiprocessing
import os
import reprlib
import signal
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, cast

import click
import uvicorn.supervisors
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from opentelemetry import context, propagate, trace
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_json
from starlette.types import Message, Receive, Scope, Send
from uvicorn.config import LOGGING_CONFIG, STARTUP_FAILURE


# --- Settings ---
class Settings(BaseModel, frozen=True, validate_by_name=True):
    """Environment variables of the same names, in capitals; an empty one counts as unset."""

    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one")
    log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = Field("info", description="severity")
    workers: int = Field(1, ge=1, alias="web_concurrency", description="processes that serve")  # WORKERS is not read
    max_body_bytes: int = Field(1_048_576, ge=0, description="bytes of the largest request body; beyond it: 413")
    # Outlasts the 60 s of load balancers, since who closes first loses requests. The next two end before the last.
    timeout_keep_alive: int = Field(75, ge=1, description="seconds for which an idle connection is kept open")
    drain_seconds: float = Field(3 * ("--reload" not in sys.argv), ge=0, le=3600, description="seconds after SIGTERM")
    timeout_graceful_shutdown: int = Field(5, ge=0, le=3600, description="seconds that requests then get to finish")
    stop_seconds: int = Field(10, ge=1, description="seconds from SIGTERM to SIGKILL, which whoever stops it decides")


def read_settings(values: dict[str, Any], name: Callable[[str], str]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        sys.exit("; ".join(f"{name(str(e['loc'][0]))}={e['input']}: {e['msg']}" for e in error.errors()))


# --- Logs: one JSON object a line, or uvicorn's own coloured lines on a terminal ---
logger = logging.getLogger("service")
PLAIN = bool(sys.stdout and sys.stdout.isatty()) or not {"--help", "--version"}.isdisjoint(sys.argv)
STANDARD = vars(logging.makeLogRecord({})).keys() | {"message", "color_message", "timestamp", "level"}
PROBES, PROBED = ("/livez", "/readyz"), ('/livez HTTP/1.1" 200', '/readyz HTTP/1.1" 200')


def encode(level: str, message: str, fields: dict[str, Any]) -> bytes:
    """A line of the log as a JSON object, with the ids of the current trace, if there is one."""
    line = {"timestamp": datetime.now(UTC).isoformat(), "level": level, "message": message, **fields}
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        line |= {"trace_id": trace.format_trace_id(span.trace_id), "span_id": trace.format_span_id(span.span_id)}
    try:
        return to_json(line, fallback=repr, inf_nan_mode="strings") + b"\n"
    except ValueError:  # bytes that are not UTF-8, half a character, an object that contains itself
        return to_json({k: str(v).encode(errors="backslashreplace").decode() for k, v in line.items()}) + b"\n"


def write(lines: list[bytes]) -> None:
    """Take all lines and write them to standard output."""
    batch = max(1, 4096 // max(map(len, lines), default=1))  # a pipe keeps 4096 bytes together, beside other writers
    while lines:
        with suppress(OSError):  # a reader that has gone away ends the log, not the service
            os.write(1, b"".join(lines[:batch]))
        del lines[:batch]


class JsonHandler(logging.Handler):  # writes a record with what `extra=` adds to it and the exception it carries
    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = {"logger": record.name} | {k: v for k, v in vars(record).items() if k not in STANDARD}
            if record.exc_info and record.exc_info[0]:
                fields["exception.type"] = record.exc_info[0].__name__
                fields["exception.stacktrace"] = logging.Formatter().formatException(record.exc_info)
            fields |= {"code.stacktrace": record.stack_info} if record.stack_info else {}
            write([encode(record.levelname.lower(), record.getMessage().strip(), fields)])
        except Exception as error:  # noqa: BLE001 — of the call that logs, as when its arguments do not fit its text
            call = f"{record.pathname}:{record.lineno} {record.msg!r} % {reprlib.repr(record.args)}"
            write([encode("error", f"Cannot log {call}: {error!r}", {})])


class PrintLog(io.BytesIO):  # below sys.stdout and sys.stderr, so that what anyone prints becomes log lines, too
    def write(self, data: Any) -> int:
        lines = filter(str.strip, bytes(data).decode(errors="backslashreplace").split("\n"))
        write([encode("error" if self is sys.stderr.buffer else "info", line, {"logger": "print"}) for line in lines])
        return len(data)


if __name__ in {"__main__", "__mp_main__"}:  # this process and its workers, not somebody's import
    sys.modules.setdefault("pydantic.v1", cast("Any", None))  # FastAPI loads it just to ask whether models are of it
    LOGGING_CONFIG["root"] = {"handlers": ["default"], "level": "INFO"}
    if not PLAIN:
        LOGGING_CONFIG["handlers"] = {"default": {"()": JsonHandler}, "access": {"()": JsonHandler}}
        logging.captureWarnings(True)
        sys.excepthook = lambda *error: logger.critical("Uncaught exception", exc_info=error[1])
        threading.excepthook = lambda thread: logger.critical("Uncaught exception", exc_info=thread.exc_value)
        sys.stdout, sys.stderr = (io.TextIOWrapper(PrintLog(), "utf-8", "replace", line_buffering=True) for _ in "12")
    logging.config.dictConfig(LOGGING_CONFIG)  # as uvicorn will do, in each of its processes
    logging.getLogger("uvicorn.access").addFilter(lambda line: not line.getMessage().endswith(PROBED))
settings = read_settings({k.lower(): v for k, v in os.environ.items() if v and k != "WORKERS"}, str.upper)


# --- The life of a process ---
def ready_until_sigterm(app: FastAPI) -> None:
    """From SIGTERM to uvicorn's shutdown, be unready but serve, until load balancers have looked elsewhere."""
    loop = asyncio.get_running_loop()

    def drain(*_: Any) -> None:  # in the handler itself, so that a blocked loop is ended, too
        if not app.state.ready and multiprocessing.parent_process():
            return  # sent to the whole group, it comes from the parent, too; whose impatience is a SIGINT
        delay, app.state.ready = settings.drain_seconds * app.state.ready, False  # a second SIGTERM is impatient
        limit = delay + (cast("Any", uvicorns).__self__.config.timeout_graceful_shutdown or 0) + 1
        logger.info("Shutting down in %g s, by force in %g s", delay, limit)
        faulthandler.dump_traceback_later(limit, exit=True, file=os.open(os.devnull, os.O_WRONLY))
        loop.call_soon_threadsafe(loop.call_later, delay, uvicorns, signal.SIGTERM, None)

    if callable(uvicorns := signal.getsignal(signal.SIGTERM)):  # there is none where a test runs without a server
        signal.signal(signal.SIGTERM, drain)
    app.state.ready = True


# --- The service: this part is yours ---
def prestart(given: Settings) -> None:
    """Steps before starting: `python main.py --prestart`, before replicas. Yours go to its end, fit to be repeated."""
    if (stop := given.drain_seconds + given.timeout_graceful_shutdown + 1) >= given.stop_seconds:
        sys.exit(f"STOP_SECONDS={given.stop_seconds}: must exceed the {stop:g} s of drain, graceful shutdown and 1")
    need = 40 * (given.workers + (given.workers > 1))  # MB that each process adds, a parent included
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # cgroup v2 and v1
        with suppress(OSError, ValueError):  # the other version; "max"
            if need > (limit := int(Path(file).read_text()) // 1_000_000):
                sys.exit(f"WEB_CONCURRENCY={given.workers} needs {need} MB of memory, the limit is {limit} MB")


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Open what each process needs, such as a pool of connections, before these lines, and close it after them."""
    ready_until_sigterm(app)
    yield


app = FastAPIOffline(title="Items", version="1.0.0", lifespan=lifespan, max_body_size=settings.max_body_bytes)


class Greeting(BaseModel):
    Hello: str = Field(examples=["World"])


class Item(BaseModel):
    item_id: int = Field(examples=[5])
    q: str | None = Field(examples=["somequery"])


@app.head("/", include_in_schema=False)
@app.get("/", summary="Say hello")
async def read_root() -> Greeting:
    return Greeting(Hello="World")


@app.get("/items/{item_id}", summary="Read an item")
async def read_item(item_id: int, q: str | None = None) -> Item:
    return Item(item_id=item_id, q=q)


# --- What every service answers ---
app.add_exception_handler(Exception, lambda *_: JSONResponse({"detail": "Internal Server Error"}, 500))
app.state.ready = app.state.access_log = False
ACCESS_LINES: list[bytes] = []


@app.api_route("/livez", methods=["GET", "HEAD"], include_in_schema=False)
async def livez() -> Response:  # as long as the event loop turns; where nothing answers, a restart helps
    return Response(headers={"Cache-Control": "no-store"})


@app.api_route("/readyz", methods=["GET", "HEAD"], include_in_schema=False)
async def readyz() -> Response:  # while requests are welcome: from the end of start-up until SIGTERM
    return Response(status_code=200 if app.state.ready else 503, headers={"Cache-Control": "no-store"})


async def service(scope: Scope, receive: Receive, send: Send) -> None:
    """The app, seen from outside, where responses leave: the access log, instead of uvicorn's, by its switches."""
    if scope["type"] == "lifespan" and not PLAIN:
        uvicorns = logging.getLogger("uvicorn.access")
        app.state.access_log = bool(uvicorns.handlers) and uvicorns.isEnabledFor(logging.INFO)
        uvicorns.handlers.clear()
    if scope["type"] != "http":
        return await app(scope, receive, send)
    started, status, size, complete = perf_counter(), 500, 0, False
    if parent := b",".join(value for name, value in scope["headers"] if name == b"traceparent"):
        context.attach(propagate.extract({"traceparent": parent.decode("latin-1")}, context.Context()))

    async def observe(message: Message) -> None:
        nonlocal status, size, complete
        if message["type"] == "http.response.start":
            status = message["status"]
            if not app.state.ready:  # clients that keep connections open are to reconnect elsewhere
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        elif message["type"] == "http.response.body":
            size += len(message.get("body", b""))
            complete = not message.get("more_body")
        await send(message)
        if complete:
            log()

    def log() -> None:
        included = scope.get("fastapi", {}).get("effective_route_context")  # of a router, with its prefix
        route = getattr(included or scope.get("route"), "path_format", None)
        if not app.state.access_log or (status < 400 and route in PROBES):
            return
        fields = {
            "http.request.method": scope["method"],
            "url.scheme": scope["scheme"],
            "url.path": scope["path"],
            "http.route": route,
            "http.response.status_code": status,
            "http.response.body.size": 0 if scope["method"] == "HEAD" else size,
            "http.server.request.duration": round(perf_counter() - started, 6),
            "client.address": scope["client"] and scope["client"][0],
        }
        ACCESS_LINES.append(encode("info", f"{scope['method']} {scope['path']} {status}", fields))
        if len(ACCESS_LINES) == 1:  # one write for all that end in the same turn of the event loop: a tenth less CPU
            asyncio.get_running_loop().call_soon(write, ACCESS_LINES)

    try:
        await app(scope, receive, observe)
    except Exception:
        if not complete:
            raise  # for uvicorn to log, and to close the connection: the client learns that the response broke off
        logger.exception("Unhandled exception in %s %s", scope["method"], scope["path"])
    finally:
        if not complete:
            log()


# --- Running it: `python main.py`, on a host as in the image ---
CSP = "default-src 'self' 'unsafe-inline' data: blob:"  # what the documentation pages need, and no other host
HEADERS = [["X-Content-Type-Options", "nosniff"], ["Content-Security-Policy", CSP]]
DEFAULTS = settings.model_dump() | {"server_header": False, "reset_contextvars": True}  # no trace of an earlier request
OPTIONS = [option for option in uvicorn.main.params if option.name not in {"app", "app_dir", "factory"}]
OPTIONS += [click.Option(["--prestart"], is_flag=True, help="Run the steps before starting, and nothing else.")]


@click.command(params=OPTIONS, context_settings={"auto_envvar_prefix": "UVICORN", "default_map": DEFAULTS})
def serve(**options: Any) -> None:
    """Serve this service with uvicorn. Each option can also be set as UVICORN_<OPTION> in the environment."""
    given = read_settings(settings.model_dump() | options, lambda name: f"--{name.replace('_', '-')}")
    if options.pop("prestart"):
        return prestart(given)
    LOGGING_CONFIG["root"]["level"] = given.log_level.upper()
    options["headers"] = HEADERS + [header.split(":", 1) for header in options["headers"]]
    options["log_config"] = options["log_config"] or LOGGING_CONFIG
    if options["uds"] is None and options["fd"] is None:  # is the port free and allowed? uvicorn would not name it
        family = socket.AF_INET6 if ":" in options["host"] else socket.AF_INET
        socket.create_server((options["host"], options["port"]), family=family).close()
    if given.workers == 1 or options["reload"] or options["uds"]:
        return uvicorn.run("__main__:service", **options)
    uvicorn.Config(service, **options).load()  # so that a mistake shows here, and not in each worker again and again
    config = uvicorn.Config("__main__:service", **options)
    team = uvicorn.supervisors.Multiprocess(config, [config.bind_socket()])

    def end(*_: Any) -> None:  # instead of uvicorn's handler, which is deaf to a second SIGTERM
        again = team.should_exit.is_set() or signal.SIGTERM in team.signal_queue
        for worker in multiprocessing.active_children() if again else ():
            os.kill(cast("int", worker.pid), signal.SIGINT)
        team.signal_queue.append(signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    sys.exit(team.run() or any(worker.exitcode == STARTUP_FAILURE for worker in team.processes))


if __name__ == "__main__":
    try:
        serve.main(standalone_mode=False)
    except click.ClickException as error:
        sys.exit(error.format_message())
    except Exception as error:  # what uvicorn cannot use, but does not name; a step before starting speaks for itself
        if "--prestart" in sys.argv:
            raise
        names = [word.partition("=")[0] for word in (*os.environ, *sys.argv) if word.startswith(("UVICORN_", "--"))]
        sys.exit(f"{error}; to be mended in one of: {', '.join(['PORT', *names])}")
