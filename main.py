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
import signal
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from time import perf_counter
from typing import Any, Literal, NoReturn, cast

import click
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from opentelemetry import context, propagate, trace
from pydantic import BaseModel, Field, ValidationError
from pydantic_core import to_json
from starlette.types import Message, Receive, Scope, Send
from uvicorn.config import LOGGING_CONFIG


# --- Settings ---
class Settings(BaseModel, frozen=True, validate_by_name=True):
    """Environment variables of the same names, in capitals; an empty one counts as unset."""

    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one")
    log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = Field("info", description="severity")
    workers: int = Field(1, ge=1, alias="web_concurrency", description="processes that serve")
    # Outlasts the 60 s of load balancers, since who closes first loses requests. The next two end before Docker's 10 s.
    timeout_keep_alive: int = Field(75, ge=1, description="seconds for which an idle connection is kept open")
    drain_seconds: float = Field(3, ge=0, le=3600, description="seconds to serve on after SIGTERM")
    timeout_graceful_shutdown: int = Field(5, ge=0, description="seconds that requests then get to finish")
    max_body_bytes: int = Field(1_048_576, ge=0, description="bytes of the largest request body; beyond it: 413")


def read_settings(values: dict[str, Any]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        fail("; ".join(f"{str(e['loc'][0]).upper()}={e['input']}: {e['msg']}" for e in error.errors()))


def fail(sentence: str) -> NoReturn:
    """End the process over a mistake that its user can mend: one sentence, no traceback."""
    logger.critical(sentence)
    sys.exit(2)


# --- Logs: one JSON object a line, or uvicorn's own coloured lines on a terminal ---
logger = logging.getLogger("service")
PROBES, PROBED = ("/livez", "/readyz"), ('/livez HTTP/1.1" 200', '/readyz HTTP/1.1" 200')


def write_line(level: str, message: str, fields: dict[str, Any]) -> None:
    """Write one JSON object to standard output, with the ids of the current trace, if there is one."""
    message = message.encode(errors="backslashreplace").decode()
    line = {"timestamp": datetime.now(UTC).isoformat(), "level": level, "message": message, **fields}
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        line |= {"trace_id": trace.format_trace_id(span.trace_id), "span_id": trace.format_span_id(span.span_id)}
    with suppress(OSError):  # a reader that has gone away ends the log, not the service
        os.write(1, to_json(line, fallback=str, inf_nan_mode="strings") + b"\n")


class JsonHandler(logging.Handler):
    """Writes a log record, with what `extra=` adds to it and the exception it carries."""

    STANDARD = vars(logging.makeLogRecord({})).keys() | {"message", "color_message"}

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields = {"logger": record.name} | {k: v for k, v in vars(record).items() if k not in self.STANDARD}
            if record.exc_info and record.exc_info[0]:
                fields["exception.type"] = record.exc_info[0].__name__
                stack = logging.Formatter().formatException(record.exc_info)
                fields["exception.stacktrace"] = stack.encode(errors="backslashreplace").decode()
            write_line(record.levelname.lower(), record.getMessage().strip(), fields)
        except Exception:  # noqa: BLE001 — as in logging's own handlers
            self.handleError(record)


class PrintHandler(io.TextIOBase):
    """Takes the place of sys.stdout and sys.stderr, so that what anyone prints becomes log lines, too."""

    unfinished = ""

    def write(self, text: str) -> int:
        *lines, self.unfinished = (self.unfinished + text).split("\n")
        for line in filter(str.strip, lines):
            write_line("info", line, {"logger": "print"})
        return len(text)


if __name__ in {"__main__", "__mp_main__"}:  # this process and its workers, not somebody's import
    sys.modules.setdefault("pydantic.v1", cast("Any", None))  # FastAPI loads it just to ask whether models are of it
    LOGGING_CONFIG["root"] = {"handlers": ["default"], "level": "INFO"}
    if not (sys.stdout and sys.stdout.isatty()) and not {"--help", "--version"} & {*sys.argv}:
        LOGGING_CONFIG["handlers"] = {"default": {"()": JsonHandler}, "access": {"()": JsonHandler}}
        logging.captureWarnings(True)
        sys.excepthook = lambda *exception: logger.critical("Uncaught exception", exc_info=exception)
        sys.stdout = sys.stderr = PrintHandler()
    logging.config.dictConfig(LOGGING_CONFIG)  # as uvicorn will do, in each of its processes
    logging.getLogger("uvicorn.access").addFilter(lambda line: not line.getMessage().endswith(PROBED))
settings = read_settings({name.lower(): value for name, value in os.environ.items() if value})


# --- The life of a process and of a request ---
@contextmanager
def drain_on_sigterm(app: FastAPI) -> Generator[None]:
    """Between SIGTERM and uvicorn's shutdown, be unready but serve, until load balancers have looked elsewhere."""
    loop = asyncio.get_running_loop()

    def drain(shut_down: Any) -> None:
        delay = settings.drain_seconds if app.state.ready else 0  # a second SIGTERM is impatient
        app.state.ready = False
        logger.info("Shutting down in %g s", delay)
        limit = delay + (shut_down.__self__.config.timeout_graceful_shutdown or 0) + 1  # ends blocked threads
        faulthandler.dump_traceback_later(limit, exit=True, file=os.open(os.devnull, os.O_WRONLY))
        loop.call_later(delay, shut_down, signal.SIGTERM, None)

    if callable(uvicorns := signal.getsignal(signal.SIGTERM)):  # there is none where a test runs without a server
        signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(drain, uvicorns))
    app.state.ready = True
    yield


class RequestLog:
    """Outermost, so as to see responses as they leave: the access log, instead of uvicorn's, by the same switches."""

    def __init__(self, app: FastAPI) -> None:
        self.app, self.enabled = app, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" and isinstance(sys.stdout, PrintHandler):
            uvicorns = logging.getLogger("uvicorn.access")
            self.enabled = bool(uvicorns.handlers) and uvicorns.isEnabledFor(logging.INFO)
            uvicorns.handlers.clear()
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        started, status, size, complete = perf_counter(), 500, 0, False
        # Attached even if empty, since asyncio can hand a request the context of the one before on its connection.
        parent = {k.decode(): v.decode("latin-1") for k, v in scope["headers"] if k == b"traceparent"}
        context.attach(propagate.extract(parent, context.Context()))

        async def observe(message: Message) -> None:
            nonlocal status, size, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                if not self.app.state.ready:  # clients that keep connections open are to reconnect elsewhere
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
                complete = not message.get("more_body")
            await send(message)
            if complete:
                self.write(scope, status, size, started)

        try:
            await self.app(scope, receive, observe)
        except Exception:
            if not complete:
                raise  # for uvicorn to log, and to close the connection: the client learns that the response broke off
            logger.exception("Unhandled exception in %s %s", scope["method"], scope["path"])
        finally:
            if not complete:
                self.write(scope, status, size, started)

    def write(self, scope: Scope, status: int, size: int, started: float) -> None:
        match = scope.get("fastapi", {}).get("effective_route_context") or scope.get("route")
        route = getattr(match, "path_format", None)  # whole, where a router was included with a prefix
        if not self.enabled or (status < 400 and route in PROBES):
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
        write_line("info", f"{scope['method']} {scope['path']} {status}", fields)


# --- The service: this part is yours ---
@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Open what the service needs, such as a pool of connections, before the `with`, and close it after."""
    with drain_on_sigterm(app):
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
@app.api_route("/livez", methods=["GET", "HEAD"], include_in_schema=False)
async def livez() -> JSONResponse:  # as long as the event loop turns; where nothing answers, a restart helps
    return JSONResponse({"live": True}, headers={"Cache-Control": "no-store"})


@app.api_route("/readyz", methods=["GET", "HEAD"], include_in_schema=False)
async def readyz() -> JSONResponse:  # while requests are welcome: from the end of start-up until SIGTERM
    return JSONResponse(
        {"ready": app.state.ready}, 200 if app.state.ready else 503, headers={"Cache-Control": "no-store"}
    )


@app.exception_handler(Exception)
async def internal_server_error(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": "Internal Server Error"}, 500)


app.state.ready = False
service = RequestLog(app)


# --- Running it: `python main.py`, on a host as in the image ---
def pass_on_second_sigterm() -> None:
    """Let a second SIGTERM reach the workers: uvicorn's parent, which waits for them after the first, is deaf to it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)

    def pass_on() -> None:
        for _ in range(2):
            while os.read(reader, 1)[0] != signal.SIGTERM:
                pass
        for worker in multiprocessing.active_children():
            worker.terminate()

    threading.Thread(target=pass_on, daemon=True).start()


# The documentation pages may use the inline scripts that they have, but load nothing from other hosts.
HEADERS = ["X-Content-Type-Options:nosniff", "Content-Security-Policy:default-src 'self' 'unsafe-inline' data: blob:"]
DEFAULTS = settings.model_dump() | {"headers": HEADERS, "server_header": False}
OPTIONS = uvicorn.main.params[1:]  # all but the first, which is the app


@click.command(params=OPTIONS, context_settings={"auto_envvar_prefix": "UVICORN", "default_map": DEFAULTS})
@click.pass_context
def serve(command: click.Context, **options: Any) -> None:
    """Serve this service with uvicorn. Each option can also be set as UVICORN_<OPTION> in the environment."""
    read_settings(options)  # an option has the same bounds as a variable
    if options["uds"] is None and options["fd"] is None:  # is the port free and allowed? uvicorn would not name it
        family = socket.AF_INET6 if ":" in options["host"] else socket.AF_INET
        try:
            socket.create_server((options["host"], options["port"]), family=family).close()
        except OSError as error:
            fail(f"PORT={options['port']}: {error.strerror}; choose another port or --host")
    if options["reload"]:  # development: there is nobody to wait for
        os.environ.setdefault("DRAIN_SECONDS", "0")
    elif options["workers"] > 1:
        pass_on_second_sigterm()
    LOGGING_CONFIG["root"]["level"] = options["log_level"].upper()
    command.invoke(uvicorn.main, app="__main__:service", **options)


if __name__ == "__main__":
    try:
        serve.main(standalone_mode=False)
    except Exception as error:  # noqa: BLE001 — an option that click does not know, or that uvicorn cannot use
        fail(error.format_message() if isinstance(error, click.ClickException) else str(error))
