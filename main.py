# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "anyio", "click", "fastapi", "fastapi-offline", "httptools", "opentelemetry-api", "pydantic", "pydantic-core",
#     "starlette", "uvicorn>=0.54,<0.55", "uvloop; sys_platform != 'win32'",
#     "httpx",  # for requests of your service to others, and of its test to it
# ]
# ///
"""A FastAPI service in one file. First comes the service, which is yours; then what makes it at home in a container."""

import signal
import sys

# The first process of a container ignores SIGTERM until it has a handler. This handler is for the time of the imports.
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import BaseModel, Field

# --- Your service: everything that you add goes here ---
# Add routes, models, middleware and exception handlers below `app`. The second part of the file wraps them, so that a request
# that it refuses may never come to your middleware. If you give a function, a class or a variable of this file a name that it
# uses, or one of Python's such as `list`, the service refuses to start and says which. A package that you import goes into
# the dependencies at the head; `make lock` then writes requirements.txt.
# - `settings` has no value yet at this point. So a middleware that needs one is added near the end of the file, where the
#   other calls of `app.add_middleware` are.
# - The second part answers the probes `/livez` and `/readyz`. A route of yours at one of these paths answers instead of it,
#   except during start-up and after SIGTERM.
# - A handler for `Exception` answers from outside of all middleware. So it has to bring what headers it needs, as
#   `internal_server_error` does with `SAFE_HEADERS`.
# - Bodies of requests are limited by the container's setting MAX_BODY_BYTES. Each response has a Content-Security-Policy that
#   allows nothing from other hosts; a page of yours that loads from one has to send that header itself.


class Settings(BaseModel):
    """Your settings: `hello` is the variable HELLO, or the content of the file that HELLO_FILE names.

    Each is one value, no list. Do not name one `path` or `home`: it would get what PATH or HOME is already.
    """

    hello: str = "World"


# `settings` gets its value in the second part of the file, so use it inside functions only.
settings: Settings


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    """Open before the `yield` what all requests share, such as `app.state.pool`, and close it after.

    A SIGTERM before the service has started ends the process at once: nothing is closed then.
    """
    yield


def prestart() -> None:
    """Steps before starting, such as a migration, which `python main.py --prestart` runs, and `python main.py` does not.

    `settings` is there, but no app runs. This may be an `async def`, too. An exception ends the steps with status 1. The
    deployments in `deploy/` run them once, before any replica starts; if they fail, no replica does.
    """


app = FastAPI(
    title="Items",
    version="1.0.0",
    lifespan=lifespan,
    # Where OpenTelemetry is set up, FastAPI (since 0.142) exports a trace of each request; this leaves out those of the probes.
    # You may delete this argument. It is a lambda, because `is_probe` is defined further down.
    telemetry={"exclude": lambda scope: is_probe(scope)},
)


class Greeting(BaseModel):
    Hello: str = Field(examples=["World"])  # capitalised as in FastAPI's guide


class Item(BaseModel):
    item_id: int = Field(examples=[5])
    q: str | None = Field(examples=["somequery"])


@app.head("/", include_in_schema=False)  # some load balancers send HEAD, which a GET route does not answer
@app.get("/", summary="Say hello")
async def read_root() -> Greeting:
    return Greeting(Hello=settings.hello)


@app.get("/items/{item_id}", summary="Read an item")
async def read_item(item_id: int, q: str | None = None) -> Item:
    return Item(item_id=item_id, q=q)


# --- The container's side: probes, log, limits, settings, start and stop ---

# A copy of all names so far. At the end of the file, those that the code below has overwritten are refused. After a call of
# `importlib.reload`, as in a test, `__yours__` is there already, and so are the names of the code below, which would be taken
# for yours: so the copy is empty then.
__yours__ = {} if "__yours__" in globals() else globals().copy()

# `signal` and `sys` are imported a second time: where you have overwritten one, this undoes it, and `refuse_names` says so.
import asyncio
import builtins
import collections
import collections.abc
import contextlib
import contextvars
import datetime as dt
import functools
import gc
import inspect
import io
import logging
import logging.config
import multiprocessing
import os
import pathlib
import queue
import re
import signal
import socket
import sys  # noqa: F811
import threading
import time
import typing
import urllib.parse
from typing import Any

import anyio
import click
import fastapi
import httptools
import opentelemetry.context
import pydantic
import pydantic_core
import starlette.routing
import uvicorn
from fastapi import Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import iter_route_contexts
from fastapi.staticfiles import StaticFiles
from fastapi_offline import consts
from opentelemetry import baggage, propagate, trace
from starlette import types as asgi
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.body_limit import MAX_BODY_SIZE_SCOPE_KEY, RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect
from starlette.websockets import WebSocketDisconnect
from uvicorn.config import LOG_LEVELS, LOGGING_CONFIG
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if sys.platform != "win32":
    import fcntl

container_log = logging.getLogger("service")
IS_OURS = __name__ in {"__main__", "__mp_main__"}  # this is `python main.py` or a worker of it, not somebody's import


def refuse_start(error: Exception) -> typing.NoReturn:
    """Say in a sentence why this service does not start. Where something else imports this file, that is an exception."""
    if not IS_OURS:
        raise error
    container_log.critical("%s", error)
    sys.exit(1)


def refuse_names(taken: collections.abc.Sequence[str]) -> None:
    """Refuse to start if there are names of yours that the container's side needs."""
    if taken:
        names = ", ".join(taken)
        refuse_start(
            NameError(f"main.py: names of yours that the container's side needs; call them differently: {names}")
        )


# Names of Python's come first, since all that follows relies on them: as plain text on stderr, for want of a log. Those that
# are for a prompt alone, such as `exit`, may be taken. Their kind is asked by `__class__`, since `type` may be yours here.
refuse_names(
    [
        name
        for name, value in __yours__.items()
        if not name.startswith("_")
        and name in builtins.__dict__
        and value is not builtins.__dict__[name]
        and builtins.__dict__[name].__class__.__module__ != "_sitebuiltins"
    ]
)


# Log: JSON on stdout, or uvicorn's coloured lines on a terminal


class JsonLines:
    """Writes JSON to stdout, an object a line, from a thread: whoever adds one never waits for the reader of the log.

    The thread writes every 50 ms, not more often, since it takes the interpreter's lock from the event loop each time, and at
    once where much waits. Up to `MAX_WAITING` bytes wait; of what comes beyond, a later line says how many lines were lost.
    """

    MAX_WAITING = 1_000_000
    MUCH = MAX_WAITING // 4

    def __init__(self) -> None:
        self.stdout = sys.__stdout__.fileno() if sys.__stdout__ else None  # even if your code replaces `sys.stdout`
        self.lines: collections.deque[bytes] = collections.deque()
        # An item says that there is something to write: it wakes the thread, or ends its pause. One too many does no harm.
        # It is no Event, whose methods take a lock that the same thread cannot take again: if Python ran a `__del__` amid one
        # of them, and it logged, that would be a deadlock. A SimpleQueue is made for this.
        self.alarms: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.is_asleep = False  # the thread, until there is a line
        self.added = 0  # bytes, counted by who adds
        self.written = 0  # bytes, counted by the thread
        self.lost = 0  # lines, counted by who adds
        self.is_fork = False
        threading.Thread(target=self.write_forever, name="log", daemon=True).start()
        if sys.platform != "win32":
            os.register_at_fork(after_in_child=self.continue_in_fork)

    def continue_in_fork(self) -> None:
        """Write each line at once: a fork has only the thread that forked, and may end without a word (`os._exit`)."""
        self.is_fork = True
        self.written = self.added  # the parent writes the lines that wait

    def add(self, line: dict[str, Any]) -> None:
        """Add a line, whose `timestamp` is in seconds since 1970."""
        if self.is_fork:
            self.write(self.encode(line))
            return
        waiting = self.added - self.written
        if waiting > self.MAX_WAITING:
            self.lost += 1
            return
        data = self.encode(line)
        size = len(data)
        # This `+=` needs no lock: CPython, with its GIL, changes threads only at calls and at the ends of loops.
        self.added += size
        self.lines.append(data)
        becomes_much = waiting <= self.MUCH < waiting + size
        if self.is_asleep or becomes_much:
            self.is_asleep = False
            self.alarms.put(None)

    def flush(self) -> None:
        """Wait until everything is written, for a second at most."""
        end = time.monotonic() + 1
        while self.written < self.added and time.monotonic() < end:
            time.sleep(0.001)

    def write_forever(self) -> None:
        reported = 0
        while True:
            # Set before `lines` is looked at, so that a line that is added just now is seen, or raises an alarm.
            self.is_asleep = True
            if not self.lines:
                self.alarms.get()  # until there is a line
            self.is_asleep = False
            with contextlib.suppress(queue.Empty):
                self.alarms.get(timeout=0.05)  # a pause, in which more lines come, until much waits
            data = b"".join([self.lines.popleft() for _ in range(len(self.lines))])
            self.write(data)
            lost = self.lost - reported
            if lost:
                reported += lost
                message = f"{lost} lines lost, as more came than could be written"
                self.write(self.encode({"timestamp": time.time(), "level": "error", "message": message}))
            self.written += len(data)

    def write(self, data: bytes) -> None:
        """Write all of it while no other worker does: more than 4,096 bytes go into a pipe in parts."""
        self.lock()
        while data and self.stdout is not None:
            try:
                size = os.write(self.stdout, data)
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:  # nobody reads the log any more
                break
            else:
                data = data[size:]
        self.unlock()

    def lock(self) -> None:
        """Wait until no other process has stdout locked; where there are no such locks, go on."""
        if sys.platform != "win32" and self.stdout is not None:
            with contextlib.suppress(OSError):
                fcntl.lockf(self.stdout, fcntl.LOCK_EX)

    def unlock(self) -> None:
        if sys.platform != "win32" and self.stdout is not None:
            with contextlib.suppress(OSError):
                fcntl.lockf(self.stdout, fcntl.LOCK_UN)

    def encode(self, line: dict[str, Any]) -> bytes:
        """The line as JSON, its `timestamp` as RFC 3339 has it."""
        line["timestamp"] = dt.datetime.fromtimestamp(line["timestamp"], dt.UTC).isoformat(timespec="microseconds")
        try:
            return pydantic_core.to_json(line, fallback=repr, inf_nan_mode="strings") + b"\n"
        except Exception:  # noqa: BLE001 — bytes that are not UTF-8, half a character, an object that contains itself
            return pydantic_core.to_json({self.show(name): self.show(value) for name, value in line.items()}) + b"\n"

    def show(self, value: Any) -> str:
        try:
            return str(value).encode(errors="backslashreplace").decode()
        except Exception as error:  # noqa: BLE001 — of the object's own method
            return f"{type(value).__name__} that cannot be shown: {error!r}"


json_lines = JsonLines() if IS_OURS and not (sys.__stdout__ and sys.__stdout__.isatty()) else None

# The span of the request that is being served. OpenTelemetry's own is over before uvicorn logs an exception.
request_span = contextvars.ContextVar("request_span", default=trace.INVALID_SPAN_CONTEXT)


def trace_ids(span: trace.SpanContext) -> dict[str, str]:
    """The fields of a log line that say to which span it belongs; none for an invalid span."""
    if not span.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(span.trace_id), "span_id": trace.format_span_id(span.span_id)}


class JsonHandler(logging.Handler):
    """Makes a JSON line of each record, with the ids of the current trace and what `extra=` adds.

    What it adds under a name that the line has already, such as `level`, is there as `extra.level`.
    """

    STANDARD = vars(logging.makeLogRecord({})).keys() | {"message", "color_message"}

    def emit(self, record: logging.LogRecord) -> None:
        line = {"timestamp": record.created, "level": record.levelname.lower(), "logger": record.name}
        try:
            line["message"] = record.getMessage().strip()
        except Exception as error:  # noqa: BLE001 — of the call that logs, since its arguments do not fit its text
            line["level"] = "error"
            line["message"] = f"Cannot log {record.msg!r} at {record.pathname}:{record.lineno}: {error!r}"
        if record.exc_info and record.exc_info[0]:
            line["exception.type"] = record.exc_info[0].__name__
            line["exception.stacktrace"] = self.format_traceback(record.exc_info)
        if record.stack_info:
            line["code.stacktrace"] = record.stack_info
        span = trace.get_current_span().get_span_context()
        if not span.is_valid:
            span = request_span.get()
        line.update(trace_ids(span))
        for name, value in vars(record).items():
            if name not in self.STANDARD:
                line[f"extra.{name}" if name in line else name] = value
        if json_lines:
            json_lines.add(line)

    def format_traceback(self, exc_info: Any) -> str:
        try:
            return logging.Formatter().formatException(exc_info)
        except Exception as failure:  # noqa: BLE001 — as where Python looks for names in a package that cannot be imported
            return f"{exc_info[1]!r}; its traceback cannot be shown: {failure!r}"

    def flush(self) -> None:
        """Wait for the lines of this process, for a second at most; the interpreter does so at its end."""
        if json_lines:
            json_lines.flush()


class OurErrors(logging.Filter):
    """Leaves out what uvicorn logs of an exception that says that a client has left: it is no error of the service."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name != "uvicorn.error":
            return True
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, ClientDisconnect | WebSocketDisconnect)


def log_exception_of_thread(end: threading.ExceptHookArgs) -> None:
    if end.exc_type is not SystemExit:
        container_log.critical("Uncaught exception", exc_info=end.exc_value)


def configure_logging() -> None:
    """Set up all of this process's log; `LOGGING_CONFIG` is what uvicorn sets up once more in each of its processes."""
    LOGGING_CONFIG["root"] = {"handlers": ["default"], "level": "INFO"}  # until `main` knows `--log-level`
    if json_lines:
        LOGGING_CONFIG["handlers"]["default"] = {"()": JsonHandler}
        for formatter in LOGGING_CONFIG["formatters"].values():
            formatter["use_colors"] = False
    LOGGING_CONFIG["filters"] = {"errors of ours": {"()": OurErrors}}
    LOGGING_CONFIG["handlers"]["default"]["filters"] = ["errors of ours"]
    logging.config.dictConfig(LOGGING_CONFIG)
    logging.captureWarnings(True)
    sys.excepthook = lambda *error: container_log.critical("Uncaught exception", exc_info=error)
    threading.excepthook = log_exception_of_thread
    if isinstance(sys.__stdout__, io.TextIOWrapper):
        sys.__stdout__.reconfigure(line_buffering=True)  # so that `print` shows at once


if IS_OURS:
    configure_logging()


# Settings


class ServerSettings(pydantic.BaseModel, frozen=True):
    """The container's settings, each a variable of its name in capitals, or a file that `<NAME>_FILE` names.

    What wins, in this order: an option of uvicorn's (`--port`), its variable (`UVICORN_PORT`), the setting (`PORT`).
    """

    port: int = pydantic.Field(8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one")
    log_level: typing.Annotated[
        typing.Literal["critical", "error", "warning", "info", "debug", "trace"],
        pydantic.BeforeValidator(str.lower),
        pydantic.Field(description="least severe level to log"),
    ] = "info"
    web_concurrency: int = pydantic.Field(1, ge=1, description="processes that serve")
    max_body_bytes: int = pydantic.Field(
        1_048_576, ge=0, description="bytes of the largest request body; beyond it: 413"
    )
    max_concurrency: int = pydantic.Field(
        256, ge=1, description="requests, with their background tasks, that a process serves at once; beyond it: 503"
    )
    max_websockets: int = pydantic.Field(
        1024, ge=0, description="WebSockets, which need a package such as `websockets`, at once; beyond it: 503"
    )
    timeout_keep_alive: int = pydantic.Field(
        75, ge=1, le=3600, description="seconds for which a connection may be idle"
    )
    client_header_timeout: int = pydantic.Field(
        60, ge=1, le=3600, description="seconds for the head of a request to arrive"
    )
    client_body_timeout: int = pydantic.Field(
        60, ge=1, le=3600, description="seconds between two pieces of a body; beyond: 408"
    )
    send_timeout: int = pydantic.Field(
        60, ge=1, le=3600, description="seconds for which a client may take nothing of a response"
    )
    drain_seconds: float = pydantic.Field(3, ge=0, le=3600, description="seconds to serve on after SIGTERM")
    timeout_graceful_shutdown: int = pydantic.Field(
        5, ge=0, le=3600, description="seconds that requests then get to finish"
    )


class SettingError(ValueError):
    """A setting that does not hold, in one sentence that names its variable."""


SettingsModel = typing.TypeVar("SettingsModel", bound=pydantic.BaseModel)


def read_environment(model: type[SettingsModel], shows_values: bool) -> SettingsModel:
    """Read the settings that a model names; an empty variable or file counts as unset.

    Raises `SettingError` for what does not hold, with its value if `shows_values`: a value of your settings may be a secret.
    """
    values: dict[str, str] = {}
    origins: dict[str, str] = {}
    for name in model.model_fields:
        variable = name.upper()
        value = os.environ.get(variable)
        # Where there is a setting `data_file`, DATA_FILE is that one, not a file for `data`.
        has_neighbour = f"{variable}_FILE" in {field.upper() for field in model.model_fields}
        file = None if has_neighbour else os.environ.get(f"{variable}_FILE")
        if value and file:
            raise SettingError(f"{variable} and {variable}_FILE are both set: one of them is too many")
        if file:
            value = read_setting_file(variable, file)
            origins[name] = f"{variable}_FILE={file}"
        elif value and shows_values:
            origins[name] = f"{variable}={value}"
        else:
            origins[name] = variable
        if value:
            values[name] = value
    try:
        return model.model_validate(values, by_alias=False, by_name=True)  # variables have the names of fields
    except pydantic.ValidationError as error:
        problems = []
        for problem in error.errors():
            name = str(problem["loc"][0]) if problem["loc"] else ""
            problems.append(f"{origins.get(name, model.__name__)}: {problem['msg']}")
        raise SettingError("; ".join(problems)) from None


def read_setting_file(variable: str, file: str) -> str:
    try:
        return pathlib.Path(file).read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{variable}_FILE={file}: {error}") from None


HIDDEN_OPTIONS = {"app", "app_dir", "factory", "env_file"}  # uvicorn's options that this file settles


def read_options(ours: ServerSettings) -> dict[str, Any]:
    """Uvicorn's options, and `--prestart`, by their names; none where another server imports this file.

    Raises `click.ClickException` for what is no option.
    """
    if not IS_OURS:
        return {}
    command = click.Command(
        "main.py",
        params=[option for option in uvicorn.main.params if option.name not in HIDDEN_OPTIONS],
        help="Serve with uvicorn. Each option is a variable, too: UVICORN_<OPTION>.",
    )
    help_text = "Run the steps before starting, and end."
    command.params.append(click.Option(["--prestart"], is_flag=True, allow_from_autoenv=False, help=help_text))
    defaults = {  # the host is uvicorn's, 127.0.0.1; the image sets UVICORN_HOST
        "port": ours.port,
        "log_level": ours.log_level,
        "workers": ours.web_concurrency,
        "timeout_keep_alive": ours.timeout_keep_alive,
        "timeout_graceful_shutdown": ours.timeout_graceful_shutdown,
        "server_header": False,
    }
    context = command.make_context("main.py", sys.argv[1:], default_map=defaults, auto_envvar_prefix="UVICORN")
    # What uvicorn would end with a traceback.
    for header in context.params["headers"]:
        if ":" not in header:
            raise click.BadParameter(f"{header!r} is not NAME:VALUE", param_hint="--header")
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        file = context.params[name]
        if file and not pathlib.Path(file).is_file():
            raise click.BadParameter(f"there is no file {file!r}", param_hint=f"--{name.replace('_', '-')}")
    return context.params


try:
    server_settings = read_environment(ServerSettings, shows_values=True)
    uvicorn_options = read_options(server_settings)
    settings = read_environment(Settings, shows_values=False)  # of your part; last, since `--help` needs none of them
except click.exceptions.Exit as end:  # after --help and --version
    sys.exit(end.exit_code)
except click.ClickException as error:
    refuse_start(SettingError(error.format_message()))
except SettingError as error:
    refuse_start(error)


# Start and stop


def is_reloading() -> bool:
    """Whether an edit restarts this process: it should do so at once then."""
    if IS_OURS:
        return uvicorn_options["reload"]
    return sys.argv[1:2] == ["dev"] or "--reload" in sys.argv  # `fastapi dev` and `uvicorn --reload`


class Lifecycle:
    """Makes SIGTERM a drain that loses no request, and answers the probes `/livez` and `/readyz`.

    `/readyz` is 200 from the end of start-up until SIGTERM. Then requests are served for `drain_seconds` more, while load
    balancers look elsewhere: each response closes its connection. After that the server stops as it does by itself; event
    streams, which would not end, are ended. Ctrl+C skips the drain. A second SIGTERM ends it early, except in a worker, where it
    may be the first one again.

    A probe that is among `own_probes`, the routes of yours, is left to its route from the end of start-up until SIGTERM.
    """

    def __init__(self, drain_seconds: float, own_probes: set[str]) -> None:
        self.drain_seconds = drain_seconds
        self.own_probes = own_probes  # paths
        self.is_starting = False
        self.is_draining = False
        self.is_stopping = False
        self.stop_server: collections.abc.Callable[[], object] = lambda: None
        self.interrupt_server: Any = None
        # None until the app has started, and where SIGTERM is not ours, as with `--lifespan off`: then there is no drain.
        self.loop: asyncio.AbstractEventLoop | None = None
        self.event_streams: set[asyncio.Task[Any]] = set()

    def probe(self, scope: asgi.Scope) -> Response | None:
        """The answer to a probe; none where a route of yours is to give it."""
        path = path_in_app(scope)
        is_up = not (self.is_starting or self.is_draining)
        if is_up and path in self.own_probes:
            return None
        status = 200 if is_up or path == "/livez" else 503
        return Response(status_code=status, headers={"Cache-Control": "no-store"})

    async def start(self, app: asgi.ASGIApp, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        """Run the app's lifespan, with our handlers of signals in the place of the server's, which ours call in the end.

        Where no server has set any, as in a test, nothing is replaced. A handler that your `lifespan` sets finds ours by
        `signal.getsignal`, and can call it.
        """
        self.is_starting = True
        servers_own = signal.getsignal(signal.SIGTERM)
        takes_signals = callable(servers_own) and threading.current_thread() is threading.main_thread()
        if takes_signals:
            self.stop_server = lambda: servers_own(signal.SIGTERM, None)
            signal.signal(signal.SIGTERM, self.on_sigterm)
            self.interrupt_server = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, self.on_sigint)
            if sys.platform != "win32":
                os.register_at_fork(after_in_child=self.leave_fork)

        async def send_when_started(message: asgi.Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.is_starting = False
                if takes_signals:
                    with contextlib.suppress(RuntimeError):  # where the loop is not asyncio's, but trio's
                        self.loop = asyncio.get_running_loop()
            await send(message)

        await app(scope, receive, send_when_started)

    def on_sigterm(self, *_: Any) -> None:
        """Begin the drain, or end the process at once before it has started, since nothing is served yet."""
        if self.is_starting:
            if json_lines:
                json_lines.flush()
            os._exit(128 + signal.SIGTERM)  # no `sys.exit`: that is an exception, which the start could catch
        if self.loop is None:
            self.stop_server()
        else:
            self.loop.call_soon_threadsafe(self.drain)

    def on_sigint(self, number: int, frame: Any) -> None:
        """Stop without a drain, as the server does on Ctrl+C, and end the event streams, for which it would wait."""
        if self.loop:
            self.loop.call_soon_threadsafe(self.end_event_streams)
        if callable(self.interrupt_server):
            self.interrupt_server(number, frame)

    def leave_fork(self) -> None:
        """Let a fork of the service, such as one of a pool of processes, end on SIGTERM as any process does."""
        if signal.getsignal(signal.SIGTERM) == self.on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def drain(self) -> None:
        """Begin the drain; end it if it has begun."""
        assert self.loop is not None
        if self.is_draining:
            # A worker's second one may be the same, once from its group and once from its parent.
            if multiprocessing.parent_process() is None:
                self.stop()
            return
        self.is_draining = True
        container_log.info("Shutting down in %g s", self.drain_seconds)
        self.loop.call_later(self.drain_seconds, self.stop)

    def stop(self) -> None:
        """End the event streams, and let the server stop."""
        if not self.is_stopping:
            self.end_event_streams()
            self.stop_server()

    def end_event_streams(self) -> None:
        """End those that are open, and from now on each that begins."""
        self.is_stopping = True
        for task in self.event_streams:
            task.cancel()

    def current_task(self) -> asyncio.Task[Any] | None:
        """The task that serves the current request; none where there is no drain."""
        return asyncio.current_task() if self.loop else None

    def add_event_stream(self, task: asyncio.Task[Any] | None) -> None:
        """Have the task of an event stream cancelled when the server stops."""
        if task is None:
            return
        self.event_streams.add(task)
        if self.is_stopping:
            task.cancel()


# Each request and its response


PROBES = {"/livez", "/readyz"}
# A key of `scope["extensions"]`, set where the class `Http` has answered a request with 400 itself. The access log looks at it.
REFUSED = "service.refused"
TRACE_HEADERS = {b"traceparent", b"tracestate", b"baggage"}
POLICY = "content-security-policy"
UVICORNS_HEADERS = {header.partition(":")[0].strip().lower() for header in uvicorn_options.get("headers", ())}
# Headers that a response gets if neither it nor uvicorn (`--header`) has one of that name. A page of yours that loads from
# other hosts brings a policy of its own.
SAFE_HEADERS = {
    name: value
    for name, value in {
        "x-content-type-options": "nosniff",
        POLICY: "default-src 'self' 'unsafe-inline' data: blob:",
    }.items()
    if name not in UVICORNS_HEADERS
}


def is_http1(scope: asgi.Scope) -> bool:
    """Whether a response may say `Connection: close`, which HTTP/2 forbids."""
    return scope.get("http_version") in {"1.0", "1.1"}


def path_in_app(scope: asgi.Scope) -> str:
    """The path without the prefix under which a proxy, or another app, serves this one."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


def is_probe(scope: asgi.Scope) -> bool:
    return scope["type"] == "http" and path_in_app(scope) in PROBES


def probes_of(app: fastapi.FastAPI) -> set[str]:
    """The paths of the probes for which the app has a route of its own, or one of a router that it includes."""
    return PROBES & {route.path for route in iter_route_contexts(app.routes) if "GET" in (route.methods or ())}


def client_address(scope: asgi.Scope) -> str | None:
    return scope["client"][0] if scope.get("client") else None


class Envelope:
    """The outermost middleware: continues the caller's trace, answers probes, and has an `EnvelopeResponder` do the rest.

    The headers are added to each response that has none of the same name. The lines of the requests go to `lines`, or to the
    logger `access` where that is None; with `has_access_log` false there are none.
    """

    def __init__(
        self,
        app: asgi.ASGIApp,
        lifecycle: Lifecycle,
        headers: dict[str, str],
        has_access_log: bool,
        lines: JsonLines | None,
    ) -> None:
        self.app = app
        self.lifecycle = lifecycle
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.has_access_log = has_access_log
        self.lines = lines

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        if scope["type"] == "lifespan":
            await self.lifecycle.start(self.app, scope, receive, send)
            return
        token = self.enter_trace(scope)
        try:
            if scope["type"] == "http":
                await self.respond(scope, receive, send)
            else:
                await self.app(scope, receive, send)
        finally:
            if token:
                opentelemetry.context.detach(token)

    def enter_trace(self, scope: asgi.Scope) -> contextvars.Token[opentelemetry.context.Context] | None:
        """Note which span the log is to name: the one that FastAPI has started for this request, or else the caller's.

        The caller's becomes the current span, until it is left again with the token that this returns.
        """
        current = trace.get_current_span().get_span_context()
        if current.is_valid and not current.is_remote:
            request_span.set(current)  # FastAPI has started it, outside of all middleware
            return None
        headers: dict[str, str] = {}
        for name, value in scope["headers"]:
            if name in TRACE_HEADERS:
                key, text = name.decode(), value.decode("latin-1")
                headers[key] = f"{headers[key]},{text}" if key in headers else text
        context = opentelemetry.context.get_current()
        if not headers and not context:  # so it is for most requests
            request_span.set(trace.INVALID_SPAN_CONTEXT)
            return None
        # The context may hold the caller of another request: in a pipeline, uvicorn starts a request where the one before it
        # ends, and so with its context. That caller is taken out, and the one of this request, if any, put in; all else stays.
        without_caller = baggage.clear(trace.set_span_in_context(trace.INVALID_SPAN, context))
        context = propagate.extract(headers, without_caller)
        request_span.set(trace.get_current_span(context).get_span_context())
        return opentelemetry.context.attach(context)

    async def respond(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        responder = EnvelopeResponder(self, scope, receive, send)
        app = self.app
        if responder.is_probe and scope["method"] in {"GET", "HEAD"}:
            app = self.lifecycle.probe(scope) or app  # a response is an app
            if scope["method"] == "HEAD":  # which a route of yours need not know; the server leaves out the body
                scope = {**scope, "method": "GET"}
        try:
            await app(scope, responder.receive, responder.send)
        except asyncio.CancelledError:
            if not responder.is_cut_by_stop():
                raise
            await responder.end()
        finally:
            responder.finish()


class EnvelopeResponder:
    """One request and its response: adds the headers that are due, and logs a line once the response is complete.

    Where the log is JSON, the line goes straight to `JsonLines`, which is quicker than a record; else it is a record of the
    logger `access`. Its fields have OpenTelemetry's names. Probes that succeed have none; a log level above `info` leaves
    all out.
    """

    logger = logging.getLogger("access")

    def __init__(self, envelope: Envelope, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        self.envelope = envelope
        self.lifecycle = envelope.lifecycle
        self.task = envelope.lifecycle.current_task()
        self.scope = scope
        self.client_receive = receive
        self.client_send = send
        self.root_path = scope.get("root_path", "")  # to which a mounted app adds its own
        self.is_probe = is_probe(scope)
        self.started = time.perf_counter()
        self.has_begun = False  # the response
        self.has_left = False  # the client, before its response
        self.is_complete = False
        self.is_logged = False
        self.status = 500  # until a response begins; where an exception passes, Starlette makes one outside of us
        self.size = 0  # bytes

    async def receive(self) -> asgi.Message:
        message = await self.client_receive()
        if message["type"] == "http.disconnect" and not self.has_begun:
            self.has_left = True
        return message

    async def send(self, message: asgi.Message) -> None:
        if message["type"] == "http.response.start":
            await self.send_start(message)
        elif message["type"] == "http.response.body":
            await self.send_body(message)
        else:
            await self.client_send(message)

    async def send_start(self, message: asgi.Message) -> None:
        self.has_begun = True
        self.status = message["status"]
        headers = list(message.get("headers", ()))
        own = {name.lower(): value for name, value in headers}
        headers += [header for header in self.envelope.headers if header[0] not in own]
        if self.lifecycle.is_draining and is_http1(self.scope):
            headers.append((b"connection", b"close"))
        await self.client_send({**message, "headers": headers})
        if own.get(b"content-type", b"").startswith(b"text/event-stream"):
            self.lifecycle.add_event_stream(self.task)

    async def send_body(self, message: asgi.Message) -> None:
        self.size += len(message.get("body", b""))
        self.is_complete = not message.get("more_body", False)
        try:
            await self.client_send(message)
        finally:  # also where Starlette cancels this task amid that, as it may after the last piece of a stream
            if self.is_complete:
                self.finish()

    def is_cut_by_stop(self) -> bool:
        """Whether this is an event stream that the stop has cancelled, and that still lacks its end."""
        return self.lifecycle.is_stopping and self.task in self.lifecycle.event_streams and not self.is_complete

    async def end(self) -> None:
        """Complete a response that was cut, in the task that `Lifecycle.end_event_streams` has cancelled."""
        if self.task:
            self.task.uncancel()  # so that it may go on to its end
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    def finish(self) -> None:
        """Log the request, and let the stop no longer cancel its task, which may go on with work in the background."""
        self.lifecycle.event_streams.discard(self.task)
        self.log()

    def log(self) -> None:
        if self.is_logged or not self.envelope.has_access_log or not self.logger.isEnabledFor(logging.INFO):
            return
        scope = self.scope
        status = self.status
        size = 0 if scope["method"] == "HEAD" else self.size
        if REFUSED in scope.get("extensions", ()):
            status = 400
            size = 0
        elif self.has_left:
            status = 499  # nginx's number for a client that has left
        if self.is_probe and status < 400:
            return
        self.is_logged = True
        message = f"{scope['method']} {urllib.parse.quote(scope['path'])} {status}"
        fields = {
            "http.request.method": scope["method"],
            "url.scheme": scope.get("scheme", "http"),
            "url.path": scope["path"],
            "http.route": self.route(),
            "http.response.status_code": status,
            "http.response.body.size": size,
            "http.server.request.duration": round(time.perf_counter() - self.started, 6),
            "client.address": client_address(scope),
        }
        if self.envelope.lines is None:
            self.logger.info("%s", message, extra=fields)
            return
        line = {"timestamp": time.time(), "level": "info", "logger": "access", "message": message}
        self.envelope.lines.add(line | fields | trace_ids(request_span.get()))

    def route(self) -> str | None:
        """The template of the path, with the prefixes of routers and of mounted apps, which a route does not know by itself.

        Such as `/api/{tenant}/items/{item_id}` for `/api/5/items/7`, which is the example of the comments below. A prefix is
        guessed by its values: a part of it that equals the value of a parameter is shown as that parameter.
        """
        route = self.scope.get("route")  # of "/items/{item_id}"
        if not hasattr(route, "path_format"):  # none has matched, or Starlette's `Host`, which has no path
            return None
        values = {name: str(value) for name, value in self.scope["path_params"].items()}  # {tenant: 5, item_id: 7}
        try:
            own = route.path_format.format(**values)  # "/items/7"
        except (KeyError, IndexError, ValueError):  # the "{path}" of a mount, such as StaticFiles, has no value
            return route.path_format
        path = self.scope["path"].removeprefix(self.root_path)
        if path == own or not path.endswith(own):  # there is no prefix, or something has changed the path
            return route.path_format
        prefix = path.removesuffix(own)  # "/api/5"
        # Only what the route's own template lacks can be in the prefix.
        others = {name: value for name, value in values.items() if "{" + name + "}" not in route.path_format}
        templates = {value: "{" + name + "}" for name, value in others.items()}  # {5: "{tenant}"}
        parts = [templates.get(part, part) for part in prefix.split("/")]
        return "/".join(parts) + route.path_format


# What is refused


class Overload:
    """Answers 503 with `Retry-After` to what exceeds a number of requests, and one of WebSockets, served at once."""

    def __init__(self, app: asgi.ASGIApp, requests: int, websockets: int) -> None:
        self.app = app
        self.limits = {"http": requests, "websocket": websockets}
        self.running = {"http": 0, "websocket": 0}

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        kind = scope["type"]
        if kind not in self.limits or is_probe(scope):  # a probe that comes here is a route of yours
            await self.app(scope, receive, send)
            return
        if self.running[kind] >= self.limits[kind]:
            # For a WebSocket, Starlette makes of it the answer to the handshake.
            refusal = JSONResponse({"detail": "Too many requests at once"}, 503, {"Retry-After": "1"})
            await refusal(scope, receive, send)
            return
        self.running[kind] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.running[kind] -= 1


class BodyLimits:
    """Limits the bytes of a request's body, by Starlette's `RequestBodyLimitMiddleware`, and its time.

    What is beyond a limit is refused, by an exception that `receive` raises: 413 for the bytes, 408 for the time. The client
    gets it even if the app answers something else, and its connection is closed. If the app never reads the body, only its
    announced length is checked. A request without a body costs nothing here.
    """

    def __init__(self, app: asgi.ASGIApp, max_body_size: int, timeout: float) -> None:
        self.app = app
        self.max_body_size = max_body_size
        self.timeout = timeout

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        if not self.has_body(scope):
            await self.app(scope, receive, send)
            return
        app: asgi.ASGIApp = BodyResponder(self.app, self.timeout)
        # `FastAPI(max_body_size=…)`, which is outside of all middleware, has set a limit: that one holds, not this.
        if MAX_BODY_SIZE_SCOPE_KEY not in scope:
            app = RequestBodyLimitMiddleware(app, self.max_body_size)

        async def send_and_close(message: asgi.Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in {408, 413} and is_http1(scope):
                message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        await app(scope, receive, send_and_close)

    def has_body(self, scope: asgi.Scope) -> bool:
        if scope["type"] != "http":
            return False
        if not is_http1(scope):
            return True  # HTTP/2 does not announce it
        for name, _ in scope["headers"]:
            if name in {b"content-length", b"transfer-encoding"}:
                return True
        return False


class BodyResponder:
    """One request with a body: limits the time for which the app waits for a piece of it, and answers a refusal.

    The refusal is the 408 of this class, or the 413 that Starlette's `receive` raises. It is an app, since Starlette's limit
    calls it with that `receive`.
    """

    def __init__(self, app: asgi.ASGIApp, timeout: float) -> None:
        self.app = app
        self.timeout = timeout  # seconds
        self.scope: asgi.Scope = {}
        self.receive: Any = None
        self.send: Any = None
        self.is_whole = False  # the body
        self.is_cut = False  # the body, which was late or too large, after the response had begun
        self.refusal: StarletteHTTPException | None = None
        self.is_answered = False  # the refusal, so that what the app sends from now on is dropped
        self.has_response = False
        self.has_whole_response = False

    async def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        self.scope = scope
        self.receive = receive
        self.send = send
        try:
            await self.app(scope, self.receive_in_time, self.send_from_app)
        except Exception as error:
            if self.refusal and not self.has_response:
                await self.answer(self.refusal)
            is_done = self.is_answered and self.is_refusal(error)
            if not is_done:
                raise  # and is logged, even behind a refusal
        if self.is_cut and not self.has_whole_response:
            raise ClientDisconnect  # by which uvicorn ends the response, without an error in the log

    async def receive_in_time(self) -> asgi.Message:
        if self.is_whole:  # what comes next is the end of the client, whenever that is
            return await self.receive()
        with anyio.move_on_after(self.timeout):
            try:
                message = await self.receive()
            except StarletteHTTPException as refusal:  # 413
                if self.has_response:
                    return self.cut("The body of a request is too large.")
                self.refusal = refusal
                raise
            self.is_whole = not message.get("more_body", False)
            return message
        if not self.has_response:
            self.refusal = fastapi.HTTPException(408)
            raise self.refusal
        return self.cut("The body of a request did not end in time.")

    def cut(self, message: str) -> asgi.Message:
        """End the body, for which it is too late to be refused, as if the client had left."""
        container_log.warning(message, extra={"client.address": client_address(self.scope)})
        self.is_cut = True
        return {"type": "http.disconnect"}

    async def send_from_app(self, message: asgi.Message) -> None:
        if self.is_answered or self.is_cut:
            return
        if message["type"] == "http.response.start":
            # With the status of the refusal, it is the app's way to tell it. With another one, it is for an exception that
            # FastAPI, or a middleware of yours, has made of the refusal.
            if self.refusal and message["status"] != self.refusal.status_code:
                await self.answer(self.refusal)
                return
            self.has_response = True
        elif message["type"] == "http.response.body":
            self.has_whole_response = not message.get("more_body", False)
        await self.send(message)

    async def answer(self, refusal: StarletteHTTPException) -> None:
        """Send the refusal in the place of the app's response."""
        self.has_response = True
        self.is_answered = True
        answer = JSONResponse({"detail": refusal.detail}, refusal.status_code)
        await answer(self.scope, self.receive, self.send)

    def is_refusal(self, error: Exception) -> bool:
        """Whether this is the refusal, which `@app.middleware("http")` may have put into an `ExceptionGroup`."""
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        return error is self.refusal


async def internal_server_error(request: Request, error: Exception) -> JSONResponse:
    """A 500 that says nothing of the inside; the server logs the exception and closes the connection.

    Starlette sends it from outside of all middleware, so that it has to bring the headers itself, as has a handler of yours.
    """
    headers = dict(SAFE_HEADERS)
    if is_http1(request.scope):
        headers["connection"] = "close"
    return JSONResponse({"detail": "Internal Server Error"}, 500, headers)


async def http_exception_with_cause(request: Request, error: Exception) -> Response:
    """FastAPI's answer. Where it blames the client for a body that the system refused, as with a full `/tmp`, log why."""
    assert isinstance(error, StarletteHTTPException)
    if error.status_code == 400 and isinstance(error.__cause__, OSError):
        container_log.error(
            "%s %s: %s", request.method, urllib.parse.quote(request.url.path), error.detail, exc_info=error.__cause__
        )
    return await http_exception_handler(request, error)


# Documentation pages without internet


def serve_documentation_from_here(app: fastapi.FastAPI, assets: str = "/static-offline-docs") -> None:
    """Let FastAPI's pages load their scripts, styles and icon from this host, below `assets`, instead of from others.

    The same holds for the pages of each FastAPI that is mounted in it. What a visitor tries out on them may send requests to
    other hosts, such as one of `FastAPI(servers=…)`.
    """
    headers = {POLICY: f"{SAFE_HEADERS[POLICY]}; connect-src *"} if POLICY in SAFE_HEADERS else {}
    files = {
        consts.SWAGGER_JS: "swagger-ui-bundle.js",
        consts.SWAGGER_CSS: "swagger-ui.css",
        consts.REDOC_JS: "redoc.standalone.js",
        consts.FAVICON: "favicon.png",
    }

    def from_here(
        page: collections.abc.Callable[[Request], collections.abc.Awaitable[HTMLResponse]],
    ) -> collections.abc.Callable[[Request], collections.abc.Awaitable[HTMLResponse]]:
        async def respond(request: Request) -> HTMLResponse:
            html = bytes((await page(request)).body).decode()
            prefix = request.scope.get("root_path", "").rstrip("/")
            for url, file in files.items():
                html = html.replace(url, f"{prefix}{assets}/{file}")
            html = re.sub('<link href="https://[^>]*>', "", html)  # a font, which the pages do without
            return HTMLResponse(html, headers=headers)

        return respond

    pages = {app.docs_url, app.redoc_url} - {None}
    for index, route in enumerate(app.routes):
        if isinstance(route, starlette.routing.Mount) and isinstance(route.app, fastapi.FastAPI):
            serve_documentation_from_here(route.app, assets)
        elif type(route) is starlette.routing.Route and route.path in pages:  # exactly: those of yours are APIRoutes
            app.routes[index] = starlette.routing.Route(
                route.path, from_here(route.endpoint), name=route.name, include_in_schema=False
            )
    if app.openapi_url and pages:
        app.routes.insert(0, starlette.routing.Mount(assets, StaticFiles(packages=[("fastapi_offline", "static")])))


# The protocol's limits

# Looked at after each read: a larger head passes if a single read brings all of it, which may be 256 KB.
MAX_HEAD_BYTES = 65_536
MAX_HEADER_FIELDS = 100
MAX_PIPELINE = 100


class Http(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1 with limits to what a client sends outside of a body: how much, how slowly, how often.

    Its responses go through `TurnByTurn`, `ResponseTransport` and the `Outbox`, which come after this class.

    It knows these of uvicorn's parts, which are not documented: the attributes `app`, `client`, `cycle`, `flow`, `headers`,
    `logger`, `loop`, `parser`, `pipeline`, `server_state`, `timeout_keep_alive`, `timeout_keep_alive_task`, `transport` and
    `url`, the methods `_should_upgrade`, `_unset_keepalive_if_required`, `_unsupported_upgrade_warning`,
    `handle_websocket_upgrade`, `on_response_complete` and `timeout_keep_alive_handler`, and of a cycle, which is one request
    and its response, `disconnected`, `message_event`, `response_started`, `scope` and `transport`. Hence the bound of
    uvicorn's version at the head.
    """

    parser: Any  # uvicorn types it as optional, since it is None after the connection has closed

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.app = TurnByTurn(self.app)
        self.outbox = outbox_of(self.loop)
        self.unanswered: collections.deque[Any] = collections.deque()  # cycles without a whole response, oldest first
        self.reading: typing.Literal["nothing", "head", "body"] = "nothing"  # of a request
        self.unfinished = 0  # bytes, since the parser last had something whole
        self.is_refused = False  # input is dropped; responses that are still due are written, and then it lingers
        self.is_lingering = False  # our side is closed; it waits for the client to close its own, for some time
        self.is_stopping = False  # the server

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Limit how long a client may send nothing, and (on Linux) how long it may take nothing of a response."""
        super().connection_made(transport)
        self.wait_for_client()
        connection = transport.get_extra_info("socket")
        if hasattr(socket, "TCP_USER_TIMEOUT") and connection and connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * server_settings.send_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell each request that its client is gone, and stop the timer.

        Uvicorn tells only one request of a pipeline, and leaves the timer where the connection ends by an error.
        """
        for cycle in self.unanswered:
            self.disconnect(cycle)
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Limit the bytes that bring the parser nothing whole, and the time for a head."""
        if self.is_refused or self.is_lingering:
            return
        self.unfinished += len(data)
        after_upgrade: bytes | None = None  # what follows a head that asks for another protocol
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            after_upgrade = data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            # An exception in one of our `on_` methods is inside of the parser's own error, as its context.
            self.refuse("Invalid HTTP request received.", error.__context__ or error)
            return
        if after_upgrade is not None:
            self.upgrade(after_upgrade)
        elif self.unfinished > MAX_HEAD_BYTES:
            self.refuse("Request too large.")
        elif self.reading == "head":
            self.limit_head()

    def limit_head(self) -> None:
        """Start the time of a head that has not come whole at once, with its first bytes; later ones do not renew it.

        While a response is due, a head is not timed: `on_response_complete` starts its time then.
        """
        if self.timeout_keep_alive_task is None and self.has_answered():
            self.wait_for_client()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.reading = "head"
        self._unset_keepalive_if_required()

    def on_headers_complete(self) -> None:
        """Limit the fields and the requests that wait; a host must be named (RFC 9112, 3.2).

        A ValueError from here is answered with 400 by `data_received`.
        """
        hosts = [name for name, _ in self.headers].count(b"host")
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            raise ValueError(f"{hosts} Host fields")
        if len(self.headers) > MAX_HEADER_FIELDS:
            raise ValueError(f"{len(self.headers)} header fields")
        if len(self.pipeline) >= MAX_PIPELINE:
            raise ValueError("too many requests before their answers")
        self._unset_keepalive_if_required()
        self.unfinished = 0
        if self.parser.should_upgrade():
            return  # the parser stops here, and `data_received` calls `upgrade`
        super().on_headers_complete()  # makes a cycle of the request
        self.reading = "body"
        self.headers = []  # another list, since uvicorn would add trailers to the one that the scope holds
        self.cycle.transport = ResponseTransport(self, self.transport)
        self.unanswered.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        self.unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # the parser takes such a head for a whole message, even if a body follows: `upgrade` comes next
        self.unfinished = 0
        self.reading = "nothing"
        super().on_message_complete()

    def upgrade(self, rest: bytes) -> None:
        """Switch to WebSocket, or serve the request as if it did not ask for another protocol (RFC 9110, 7.8).

        The parser has stopped at the end of the head, after `on_headers_complete` and `on_message_complete`.
        """
        has_body = any(
            name == b"transfer-encoding" or (name == b"content-length" and int(value) > 0)
            for name, value in self.headers
        )
        if self.parser.get_method() == b"CONNECT":
            self.refuse("Invalid HTTP request received.", ValueError("CONNECT"))
        elif not self._should_upgrade():
            self._unsupported_upgrade_warning()
            self.serve_without_upgrade(rest)
        elif has_body:
            self.refuse("Invalid HTTP request received.", ValueError("a handshake with a body"))
        elif not self.has_answered():
            self.refuse("Invalid HTTP request received.", ValueError("a handshake before the answers"))
        else:  # a client sends nothing more before the handshake is answered: `rest` is empty, or dropped as by uvicorn
            self.flush()
            super().on_headers_complete()  # fills the scope; for a WebSocket it returns before it makes a cycle
            self.handle_websocket_upgrade()

    def serve_without_upgrade(self, rest: bytes) -> None:
        """Feed a new parser with the same head, without the field that stopped the first, and with what follows."""
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self.data_received(b"\r\n".join([*lines, b"", rest]))

    def has_answered(self) -> bool:
        """Whether each request that has come has its whole response."""
        return not self.unanswered

    def refuse(self, message: str, cause: BaseException | None = None) -> None:
        """Answer what is being read with a 400, unless that would be a second response to it, and end the connection.

        While responses to earlier requests are due, these come, and then the end alone, by `on_response_complete`.
        """
        self.is_refused = True
        self.warn(message, cause)
        self.flush()
        if self.reading == "body":
            self.refuse_body(message)
        elif self.has_answered():
            self.write_400(message)
            if isinstance(cause, httptools.HttpParserError):
                self.transport.close()  # as nginx does, since it is no HTTP
            else:
                self.linger()

    def refuse_body(self, message: str) -> None:
        """Refuse a request whose head the app has already, or will have after those before it in the pipeline."""
        if self.pipeline:
            # The request whose body is read is the newest, and was never served: uvicorn adds on the left, serves from the
            # right. It gets no answer, and after those to the others `on_response_complete` ends the connection.
            self.pipeline.popleft()
            self.unanswered.pop()
            return
        self.disconnect(self.cycle)
        if not self.cycle.response_started:
            self.cycle.scope.setdefault("extensions", {})[REFUSED] = {}
            self.write_400(message)
        self.linger()

    def disconnect(self, cycle: Any) -> None:
        """Tell the app that the client of this request is gone, since it gets nothing more of it."""
        cycle.disconnected = True
        cycle.message_event.set()

    def write_400(self, message: str) -> None:
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", b"%d" % len(message)),
            (b"connection", b"close"),
        ]
        lines = [b"HTTP/1.1 400 Bad Request", *(b"%s: %s" % header for header in headers), b"", message.encode()]
        self.transport.write(b"\r\n".join(lines))

    def linger(self) -> None:
        """End the connection slowly, or a client that still sends could lose the response.

        What comes is dropped, until the client ends, and for as long as a connection may be idle. With TLS it ends at once,
        since no side of it can be closed alone. Where the server stops, it does, too, or the stop would wait for the client.
        """
        if self.is_lingering or self.transport.is_closing():
            return
        self.is_lingering = True
        self.pipeline.clear()
        if self.is_stopping or not self.transport.can_write_eof():
            self.transport.close()
            return
        self.flow.resume_reading()
        self.wait_for_client()
        self.transport.write_eof()

    def warn(self, message: str, cause: BaseException | None = None) -> None:
        address = self.client[0] if self.client else None
        self.logger.warning(message, extra={"client.address": address, "cause": str(cause or "")})

    def wait_for_client(self) -> None:
        """Close the connection if the client does not send in time what is expected next: a request, or a head's rest.

        One timer, uvicorn's for idle connections, serves for all of this.
        """
        self._unset_keepalive_if_required()
        is_new = self.cycle is None  # the connection: no request has come on it
        is_head = (is_new or self.reading == "head") and not self.is_lingering
        seconds = server_settings.client_header_timeout if is_head else self.timeout_keep_alive
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        if self.reading != "nothing" and not self.is_lingering:
            self.warn(f"The {self.reading} of a request did not end in time.")
        self.flush()
        super().timeout_keep_alive_handler()

    def on_response_complete(self) -> None:
        self.unanswered.popleft()
        # Begins the next request of the pipeline, or sets the timer of an idle connection. If the response came before the
        # whole body, the same timer limits the rest of the body.
        super().on_response_complete()
        if self.is_refused and self.has_answered():
            self.flush()
            self.linger()
        elif self.reading == "head" and self.has_answered():
            self.wait_for_client()  # for the rest of a head: in the place of uvicorn's timer

    def shutdown(self) -> None:
        """Let uvicorn close the connection, if nothing is due on it, or end it with the response that is."""
        self.flush()
        self.is_stopping = True
        if self.is_lingering:
            self.transport.close()
        super().shutdown()

    def flush(self) -> None:
        """Write at once what the `Outbox` would write at the end of the turn, since something else comes after it."""
        self.outbox.send()


class Outbox:
    """The responses of all connections that wait for the turn of the event loop to end, and are then sent in one go.

    So a client of many connections, such as a proxy, is woken once, after the work of the turn, not in the midst of it.

    While several wait, Python searches the whole process for garbage a fifth as often. It searches when many objects have been
    made, and those of requests that wait are many, but no garbage yet. bench/README.md has the figures of both.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.responses: list[ResponseTransport] = []
        self.is_searching_less = False
        self.usual = gc.get_threshold()  # of the search for garbage, in objects
        self.less = self.usual

    def add(self, response: "ResponseTransport") -> None:
        if not self.responses:
            self.loop.call_soon(self.send)
        elif not self.is_searching_less:
            self.search_less()
        self.responses.append(response)

    def send(self) -> None:
        responses = self.responses
        self.responses = []
        for response in responses:
            response.flush()
        if self.is_searching_less:
            self.loop.call_soon(self.search_as_usual)  # in the next turn, when the tasks of these responses are over

    def search_less(self) -> None:
        self.is_searching_less = True
        self.usual = gc.get_threshold()
        self.less = (5 * self.usual[0], *self.usual[1:])
        gc.set_threshold(*self.less)

    def search_as_usual(self) -> None:
        if self.responses:
            return  # which have been added meanwhile: `send` comes back to this
        self.is_searching_less = False
        if gc.get_threshold() == self.less:  # else you have set another one
            gc.set_threshold(*self.usual)


@functools.cache
def outbox_of(loop: asyncio.AbstractEventLoop) -> Outbox:
    return Outbox(loop)


class ResponseTransport(asyncio.Transport):
    """What a response is written to: it keeps the pieces until the `Outbox` sends them, a head and its body as one packet.

    `TurnByTurn` makes a turn of the event loop end after each piece of a body.
    """

    def __init__(self, protocol: Http, transport: asyncio.Transport) -> None:
        super().__init__()
        self.protocol = protocol
        self.transport = transport
        self.pieces: list[Any] = []

    def write(self, data: Any) -> None:
        piece = bytes(data)  # what cannot be bytes raises here, in its own request, not among the responses of others
        if not self.pieces:
            self.protocol.outbox.add(self)
        self.pieces.append(piece)

    def flush(self) -> None:
        data = b"".join(self.pieces)
        self.pieces.clear()
        if data and not self.is_closing():
            self.transport.write(data)

    def is_closing(self) -> bool:
        """Whether nothing more can be written: our side may be closed while the connection is not."""
        return self.protocol.is_lingering or self.transport.is_closing()

    def close(self) -> None:
        """Close the connection, slowly where the client has sent, or still sends, what will have no response."""
        self.flush()
        protocol = self.protocol
        if protocol.reading != "nothing" or protocol.pipeline or protocol.is_refused:
            protocol.linger()
        else:
            self.transport.close()


class TurnByTurn:
    """Lets the turn of the event loop end after each piece of a body, and the app go on in the next one.

    Else a background task that blocks, or a stream that works long for its next piece, would hold a piece back, since
    `ResponseTransport` sends it at the end of the turn.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    def __call__(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> collections.abc.Awaitable[Any]:
        async def send_and_wait(message: asgi.Message) -> None:
            await send(message)
            if message["type"] == "http.response.body":
                await asyncio.sleep(0)

        return self.app(scope, receive, send_and_wait)


# Start


def read_limit(file: str, file_of_v1: str) -> int | None:
    """A limit of this container, which is in a file of cgroup v2 or v1; none where nothing is limited."""
    for name in (file, file_of_v1):
        with contextlib.suppress(OSError, ValueError):  # it is the other version; there is no limit, "max"
            return int(pathlib.Path("/sys/fs/cgroup", name).read_text())
    return None


def check_limits(workers: int) -> None:
    """Refuse to start with more workers than the container's limits of memory and of threads hold.

    A process takes 50 MB with all of its threads in use. These are 80 at most: 40 for `def` operations, 32 for
    `asyncio.to_thread`, and its own.
    """
    processes = workers if workers == 1 else workers + 1  # there is a parent, too
    memory = read_limit("memory.max", "memory/memory.limit_in_bytes")
    threads = read_limit("pids.max", "pids/pids.max")
    problem = ""
    if memory is not None and memory < 50_000_000 * processes:
        problem = f"{50 * processes} MB, the limit is {memory // 1_000_000} MB"
    elif threads is not None and threads < 80 * processes:
        problem = f"{80 * processes} threads, the limit is {threads} threads"
    if problem:
        refuse_start(SettingError(f"WEB_CONCURRENCY={workers} or --workers {workers} needs {problem}"))


def end_process(*_: Any) -> None:
    """Handle SIGTERM after the stop: uvicorn restores this handler, which it found at its start, and raises SIGTERM again.

    The service ends with 0, not 143. Its workers, and the processes of a pool of yours, which import this file, end as they
    would without a handler: in a pool's process, `sys.exit` would be an exception of its current task, and not end it.
    """
    if __name__ == "__main__":
        sys.exit(0)
    if json_lines:
        json_lines.flush()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTERM)


def take_steps_before_starting() -> None:
    steps: Any = prestart()
    if inspect.iscoroutine(steps):  # yours is an `async def`
        asyncio.run(steps)
    elif inspect.isgenerator(steps) or inspect.isasyncgen(steps):
        refuse_start(TypeError("prestart: a `yield` in it keeps its steps from running"))


def main() -> None:
    """Run the steps before starting, or serve with uvicorn, with JSON on stdout and the protocol's limits."""
    check_limits(uvicorn_options["workers"])  # for the steps before starting, too, or they would run for nothing
    level = LOG_LEVELS[uvicorn_options["log_level"]]
    LOGGING_CONFIG["root"]["level"] = level
    logging.getLogger().setLevel(level)  # until uvicorn sets it by its configuration
    if uvicorn_options["prestart"]:
        take_steps_before_starting()
        return
    del uvicorn_options["prestart"]  # the rest are uvicorn's
    if uvicorn_options["http"] in {"auto", "httptools"}:
        # By name, since workers import it: there, too, `sys.modules` has this file as `__main__`.
        uvicorn_options["http"] = "__main__:Http"
    else:
        container_log.warning("--http %s: our limits to heads, and SEND_TIMEOUT, do not hold", uvicorn_options["http"])
    if uvicorn_options["lifespan"] == "off":
        container_log.warning("--lifespan off: SIGTERM ends the service without a drain")
    if uvicorn_options["limit_max_requests"]:
        container_log.warning("--limit-max-requests: a process that has served so many ends without a drain")
    # Uvicorn's own lines are off in any case. Whether there are ours, the option has told when this file made the app.
    uvicorn_options["access_log"] = False
    is_alone = uvicorn_options["workers"] == 1 and not uvicorn_options["reload"]
    if uvicorn_options["host"] == "::" and is_alone and uvicorn_options["port"]:
        # With the host `None`, it listens on IPv6 and IPv4. With `::`, a single process of uvicorn would listen on IPv6
        # alone; for workers, uvicorn opens both. Not with port 0, since each would get a port of its own.
        uvicorn_options["host"] = None
    # Not `uvicorn.run`, since it is uvicorn's command that turns options into its arguments. `app_dir=None` leaves `sys.path`
    # as it is.
    click.Context(uvicorn.main).invoke(uvicorn.main, app="__main__:app", app_dir=None, **uvicorn_options)


# What makes the app of it all


refuse_names([name for name, value in __yours__.items() if globals()[name] is not value])
__yours__.clear()  # what you replace later is not kept

if Exception not in app.exception_handlers and 500 not in app.exception_handlers:
    app.add_exception_handler(Exception, internal_server_error)
if app.exception_handlers[StarletteHTTPException] is http_exception_handler:
    app.add_exception_handler(StarletteHTTPException, http_exception_with_cause)

# Each wraps those above it, so the last one sees a request first, and yours, which are further up, see it last: a 503 of
# Overload has none of their headers. One of yours that takes a setting has its place directly below this comment.
app.add_middleware(
    BodyLimits, max_body_size=server_settings.max_body_bytes, timeout=server_settings.client_body_timeout
)
app.add_middleware(Overload, requests=server_settings.max_concurrency, websockets=server_settings.max_websockets)
app.add_middleware(
    Envelope,
    lifecycle=Lifecycle(
        drain_seconds=0 if is_reloading() else server_settings.drain_seconds,
        own_probes=probes_of(app),
    ),
    headers=SAFE_HEADERS,
    has_access_log=uvicorn_options.get("access_log", True),
    # None sends these lines to the logger `access`, where `--log-config` decides on them.
    lines=None if uvicorn_options.get("log_config") else json_lines,
)
serve_documentation_from_here(app)

# Not for the steps before starting: cut short by SIGTERM, they end with 143, by the handler at the head.
if IS_OURS and not uvicorn_options["prestart"]:
    signal.signal(signal.SIGTERM, end_process)
if __name__ == "__main__":
    main()
