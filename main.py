# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi", "fastapi-offline", "httptools", "httpx", "uvicorn", "uvloop; sys_platform != 'win32'"]
# ///
"""A FastAPI service in one file. The part headed "The service" is yours; the rest makes it at home in a container."""

import asyncio
import faulthandler
import io
import logging.config
import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from time import perf_counter
from types import SimpleNamespace
from typing import Any, Literal, cast
from urllib.parse import unquote

import click
import uvicorn.supervisors
from fastapi.responses import JSONResponse, Response
from fastapi_offline import FastAPIOffline
from opentelemetry import context, propagate, trace
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_json
from uvicorn.config import LOGGING_CONFIG, STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


# --- Settings: environment variables of the same names, in capitals; an empty one counts as unset ---
class Settings(BaseModel, frozen=True, validate_by_name=True):
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one")
    log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = Field("info", description="severity")
    workers: int = Field(1, ge=1, alias="web_concurrency", description="processes that serve")  # WORKERS is not read
    max_body_bytes: int = Field(1_048_576, ge=0, description="bytes of the largest request body; beyond it: 413")
    max_concurrency: int = Field(256, ge=1, description="requests that a process serves at once; beyond it: 503")
    timeout_keep_alive: int = Field(75, ge=1, le=3600, description="seconds for a request")  # > load balancers' 60 s
    drain_seconds: float = Field(3 * ("--reload" not in sys.argv), ge=0, le=3600, description="seconds after SIGTERM")
    timeout_graceful_shutdown: int = Field(5, ge=0, le=3600, description="seconds that requests then get to finish")
    hello: str = Field("World", description="whom `GET /` says hello to")
    stop_seconds: int = Field(10, ge=1, description="seconds from SIGTERM to SIGKILL, which whoever stops it decides")


# --- Logs: one JSON object a line, or uvicorn's own coloured lines on a terminal ---
logger, access = logging.getLogger("service"), logging.getLogger("uvicorn.access")
PLAIN = bool(sys.stdout and sys.stdout.isatty()) or not {"--help", "--version"}.isdisjoint(sys.argv)
STANDARD = vars(logging.makeLogRecord({})).keys() | {"message", "color_message", "timestamp", "level"}
PROBES, PROBED = ("/livez", "/readyz"), ('/livez HTTP/1.1" 200', '/readyz HTTP/1.1" 200')
lost, pending = 0, []  # lines, since their reader made room the last time; access lines, for up to 10 ms


def encode(level: str, message: str, fields: dict[str, Any], at: datetime | None = None, within: Any = None) -> bytes:
    line = {"timestamp": (at or datetime.now(UTC)).isoformat(), "level": level, "message": message, **fields}
    if (span := trace.get_current_span(within).get_span_context()).is_valid:  # without `within`, of the current context
        line |= {"trace_id": trace.format_trace_id(span.trace_id), "span_id": trace.format_span_id(span.span_id)}
    try:
        return to_json(line, fallback=repr, inf_nan_mode="strings") + b"\n"
    except ValueError:  # bytes that are not UTF-8, half a character, an object that contains itself
        return to_json({k: str(v).encode(errors="backslashreplace").decode() for k, v in line.items()}) + b"\n"


def write(lines: list[tuple]) -> None:  # what `encode` takes; a reader who makes no room in 0.1 s misses some
    global lost
    data, end = b"".join(encode(*lines.pop(0)) for _ in lines[:]), perf_counter() + 0.1 * (not lost)
    with suppress(OSError):
        while data and select.select([], [1], [], max(0, end - perf_counter()))[1]:
            if lost:
                data, lost = encode("error", f"{lost} lines lost, as their reader was slow", {}) + data, 0
            data = data[os.write(1, data[: data.rfind(b"\n", 0, 4096) + 1 or 4096]) :]  # which a pipe keeps together
    lost += data.count(b"\n")


class JsonHandler(logging.Handler):  # writes a record with what `extra=` adds to it and the exception it carries
    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = {"logger": record.name} | {k: v for k, v in vars(record).items() if k not in STANDARD}
            if record.exc_info and record.exc_info[0]:
                stacktrace = logging.Formatter().formatException(record.exc_info)
                fields |= {"exception.type": record.exc_info[0].__name__, "exception.stacktrace": stacktrace}
            fields |= {"code.stacktrace": record.stack_info} if record.stack_info else {}
            write([(record.levelname.lower(), record.getMessage().strip(), fields)])
        except Exception as error:  # noqa: BLE001 — of the call that logs, as when its arguments do not fit its text
            write([("error", f"Cannot log {record.msg!r} at {record.pathname}:{record.lineno}: {error!r}", {})])


class PrintLog(io.BytesIO):  # below sys.stdout and sys.stderr, so that what anyone prints becomes log lines, too
    def write(self, data: Any) -> int:
        lines = filter(str.strip, bytes(data).decode(errors="backslashreplace").split("\n"))
        write([("error" if self is sys.stderr.buffer else "info", line, {"logger": "print"}) for line in lines])
        return len(data)


if __name__ in {"__main__", "__mp_main__"}:  # this process and its workers, not somebody's import
    sys.modules.setdefault("pydantic.v1", cast("Any", None))  # FastAPI loads it just to ask whether models are of it
    LOGGING_CONFIG["root"] = {"handlers": ["default"], "level": "INFO"}
    if not PLAIN:
        LOGGING_CONFIG["handlers"] = {"default": {"()": JsonHandler}, "access": {"class": "logging.NullHandler"}}
        logging.captureWarnings(True)
        sys.excepthook = lambda *error: logger.critical("Uncaught exception", exc_info=error[1])
        threading.excepthook = lambda thread: logger.critical("Uncaught exception", exc_info=thread.exc_value)
        sys.stdout, sys.stderr = (io.TextIOWrapper(PrintLog(), "utf-8", "replace", line_buffering=True) for _ in "12")
    logging.config.dictConfig(LOGGING_CONFIG)  # as uvicorn will do, in each of its processes
    access.addFilter(lambda line: not line.getMessage().replace("/1.0", "/1.1").endswith(PROBED))
try:
    settings = Settings.model_validate({k.lower(): v for k, v in os.environ.items() if v and k != "WORKERS"})
except ValidationError as error:
    sys.exit("; ".join(f"{str(e['loc'][0]).upper()}={e['input']}: {e['msg']}" for e in error.errors()))
TELEMETRY: Any = dict.fromkeys(("tracing", "metrics", "logs"), "OTEL_" in " ".join(os.environ))  # 7 µs when idle


def prestart() -> None:
    """Steps before starting: `python main.py --prestart`, before replicas. Yours go to its end, fit to be repeated."""
    if (stop := settings.drain_seconds + settings.timeout_graceful_shutdown + 1) >= settings.stop_seconds:
        sys.exit(f"STOP_SECONDS={settings.stop_seconds}: must exceed the {stop:g} s of drain, graceful shutdown and 1")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # cgroup v2 and v1
        with suppress(OSError, ValueError), open(file) as text:  # the other version; "max"
            if (need := 40 * (settings.workers + (settings.workers > 1))) > (limit := int(text.read()) // 1_000_000):
                sys.exit(f"WEB_CONCURRENCY={settings.workers} needs {need} MB of memory, the limit is {limit} MB")


# --- Your service: everything that you add goes here ---
app = FastAPIOffline(title="Items", version="1.0.0", max_body_size=settings.max_body_bytes, telemetry=TELEMETRY)


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


# --- The container's side: probes, log, limits, settings, start and stop ---
app.add_exception_handler(Exception, lambda *_: JSONResponse({"detail": "Internal Server Error"}, 500))
app.state.ready = False


async def service(scope: Any, receive: Any, send: Any) -> None:  # ASGI: the app, with probes, overload, access log
    if parent := [value for name, value in scope.get("headers", ()) if name == b"traceparent"]:
        context.attach(propagate.extract({"traceparent": b",".join(parent).decode("latin-1")}, context.Context()))
    started, status, size, ended, inside = perf_counter(), 500, 0, None, context.get_current()

    async def observe(message: Any) -> None:
        nonlocal status, size, ended, inside
        if message["type"] == "http.response.start":
            status, inside = message["status"], context.get_current()  # which has the span that telemetry exports
            message["headers"] = [*message.get("headers", ()), *[(b"connection", b"close")] * (not app.state.ready)]
        elif message["type"] == "http.response.body":
            size += len(message.get("body", b"")) * (scope["method"] != "HEAD")
            ended = None if message.get("more_body") else perf_counter()
        elif message["type"] == "lifespan.startup.complete":
            ready_until_sigterm()
        await send(message)

    if scope["type"] != "http":
        await app(scope, receive, observe)
        return write(pending)
    path, answer = scope["path"].removeprefix(scope["root_path"]), cast("Any", app)
    if path in PROBES and scope["method"] in {"GET", "HEAD"}:  # ready from the end of start-up until SIGTERM
        answer = Response(None, 200 if app.state.ready or path == "/livez" else 503, {"Cache-Control": "no-store"})
    elif scope.get("busy"):
        answer = JSONResponse({"detail": "Too many requests at once"}, 503, {"Retry-After": "1"})
    try:
        await answer(scope, receive, observe)
    except Exception:
        context.attach(inside)
        if not ended:
            raise  # for uvicorn to log, and to close the connection: the client learns that the response broke off
        logger.exception("Unhandled exception in %s %s", scope["method"], scope["path"])
    finally:
        if not PLAIN and access.handlers and access.isEnabledFor(logging.INFO) and (status > 399 or path not in PROBES):
            route = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")  # with its prefix
            fields = {"http.request.method": scope["method"], "client.address": (scope["client"] or [None])[0]}
            fields |= {"url.scheme": scope["scheme"], "url.path": scope["path"], "http.response.body.size": size}
            fields |= {"http.route": getattr(route, "path_format", None), "http.response.status_code": status}
            fields |= {"http.server.request.duration": round((ended or perf_counter()) - started, 6)}
            pending.append(("info", f"{scope['method']} {scope['path']} {status}", fields, datetime.now(UTC), inside))
            if len(pending) == 1:  # one write for all that end within 10 ms
                asyncio.get_running_loop().call_later(0.01, write, pending)


# --- Running it: `python main.py`, on a host as in the image ---
class Transport(SimpleNamespace):  # sends at the end of a turn of the event loop, in one go, what was written during it
    def __getattr__(self, name: str) -> Any:  # of the real one; before all else, what was written leaves
        return self.send() or getattr(self.transport, name)

    def write(self, data: bytes) -> None:
        if len(self.unsent) != 1:  # the first piece, or the third, as a head and the whole body are two
            self.send()
            asyncio.get_running_loop().call_soon(self.send)
        self.unsent.append(bytes(data))  # a copy of what may change

    def send(self) -> None:
        if self.unsent and not self.is_closing():
            self.transport.writelines(self.unsent)
        self.unsent.clear()


class Http(HttpToolsProtocol):  # with an end to how large a request's head is, how long it takes, how many there are
    def connection_made(self, transport: Any) -> None:
        super().connection_made(cast("Any", Transport(transport=transport, is_closing=transport.is_closing, unsent=[])))
        if self.client and sys.platform == "linux":  # over TCP; the kernel closes connections of those who do not read
            transport.get_extra_info("socket").setsockopt(6, socket.TCP_USER_TIMEOUT, 1000 * self.timeout_keep_alive)
        self.size, self.access_log, self.timeout_keep_alive = 0, PLAIN and self.access_log, self.timeout_keep_alive or 1
        self.eof_received = cast("Any", self.transport).send  # a client that sends no more still gets what was written
        self.data_received(b"")

    def data_received(self, data: bytes) -> None:
        idle, self.timeout_keep_alive_task, scope = self.timeout_keep_alive_task, None, self.scope
        super().data_received(data)
        in_head = not self.cycle or self.cycle.scope is not self.scope
        stuck = in_head or self.cycle.response_complete or (self.cycle.more_body and not self.cycle.body)
        self.size = self.size + len(data) if stuck else 0  # bytes that bring nothing
        waiting = (stuck or self.cycle.more_body) and self in self.connections  # not upgraded to WebSocket
        idle = idle and (idle if waiting and self.scope is scope else idle.cancel())  # as much time for a new request
        if waiting:
            self.timeout_keep_alive_task = idle or self.loop.call_later(self.timeout_keep_alive, self.transport.close)
        if self.size > 65536 + (0 if in_head else settings.max_body_bytes):
            self.send_400_response("Request too large")

    def on_headers_complete(self) -> None:
        unquote(self.url.decode("ascii"), errors="strict")  # raises a ValueError, too, for what is not UTF-8
        if len(self.headers) > 100 or len(self.pipeline) > 98:
            raise ValueError  # which is answered with 400, as what cannot be parsed
        cast("Any", self.scope)["busy"] = len(self.tasks) >= settings.max_concurrency
        super().on_headers_complete()


def ready_until_sigterm() -> None:  # then unready, serving, and closing each connection, so that clients look elsewhere
    loop = asyncio.get_running_loop()

    def drain(*_: Any) -> None:  # in the handler itself, so that a blocked loop is ended, too
        if not app.state.ready and __name__ == "__mp_main__":
            return  # sent to the whole group, it comes from the parent, too; whose impatience is a SIGINT
        delay, app.state.ready = settings.drain_seconds * app.state.ready, False  # a second SIGTERM is impatient
        limit = delay + (cast("Any", uvicorns).__self__.config.timeout_graceful_shutdown or 0) + 1
        logger.info("Shutting down in %g s, by force in %g s", delay, limit)
        faulthandler.dump_traceback_later(limit, exit=True, file=os.open(os.devnull, os.O_WRONLY))
        loop.call_soon_threadsafe(loop.call_later, delay, uvicorns, signal.SIGTERM, None)

    if callable(uvicorns := signal.getsignal(signal.SIGTERM)):  # there is none where a test runs without a server
        signal.signal(signal.SIGTERM, drain)
    app.state.ready = True


HEADERS = ("X-Content-Type-Options:nosniff", "Content-Security-Policy:default-src 'self' 'unsafe-inline' data: blob:")
DEFAULTS = settings.model_dump() | {"server_header": False, "reset_contextvars": True}  # no trace of an earlier request
OPTIONS = [option for option in uvicorn.main.params if option.name not in {"app", "app_dir", "factory"}]


@click.command(params=OPTIONS, context_settings={"auto_envvar_prefix": "UVICORN", "default_map": DEFAULTS})
def serve(**options: Any) -> None:
    """Serve with uvicorn. Each option is also a variable, UVICORN_<OPTION>. --prestart alone: the steps before starting."""
    LOGGING_CONFIG["root"]["level"] = options["log_level"].upper()
    options["headers"] = [header.split(":", 1) for header in (*HEADERS, *options["headers"])]
    options["http"] = {"auto": Http, "httptools": Http}.get(options["http"], options["http"])
    options["log_config"] = options["log_config"] or LOGGING_CONFIG
    if options["uds"] is None and options["fd"] is None and (host := options["host"]) is not None:
        socket.create_server((host, options["port"]), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    if options["workers"] < 2 or options["reload"] or options["uds"]:
        return uvicorn.run("__main__:service", **options)
    uvicorn.Config(service, **options).load()  # so that a mistake shows here, and not in each worker again and again
    team = uvicorn.supervisors.Multiprocess(conf := uvicorn.Config("__main__:service", **options), [conf.bind_socket()])

    def end(*_: Any) -> None:  # instead of uvicorn's handler, which is deaf to a second SIGTERM
        again = team.should_exit.is_set() or signal.SIGTERM in team.signal_queue
        for worker in [worker for worker in team.processes if again and worker.exitcode is None]:
            os.kill(cast("int", worker.pid), signal.SIGINT)
        team.signal_queue.append(signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    sys.exit(team.run() or any(worker.exitcode == STARTUP_FAILURE for worker in team.processes))


if __name__ == "__main__":
    if "--prestart" in sys.argv:
        sys.exit(prestart())
    try:
        serve.main(standalone_mode=False)
    except Exception as error:  # noqa: BLE001 — an option that is none, or what uvicorn cannot use, but does not name
        told = isinstance(error, click.ClickException) and error.format_message()
        names = [word.partition("=")[0] for word in (*os.environ, *sys.argv) if word.startswith(("UVICORN_", "--"))]
        sys.exit(told or f"{error}; to be mended in one of: {', '.join(['PORT', *names])}")
