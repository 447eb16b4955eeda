"""The image's health check asks the service in each way that it can be told to serve."""

import subprocess

import pytest
import trustme

from tests.harness import wait_until

STARTED = "Uvicorn running"


def check(container, *flags: str) -> int:
    """The exit status of the image's health check, as the engine runs it."""
    command = container.inspect("Config.Healthcheck.Test")[1:]
    result = subprocess.run(
        [container.engine, "exec", *flags, container.id, *command], capture_output=True, check=False
    )
    return result.returncode


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A folder with a server's certificate and key, and a port, which any user may read."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(folder / "certificate.pem"))
    (folder / "port").write_text("9000\n")
    for file in folder.iterdir():
        file.chmod(0o644)
    folder.chmod(0o755)
    return folder


TLS = ("--ssl-certfile=/tls/certificate.pem", "--ssl-keyfile", "/tls/key.pem")


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ((), ()),
        ((), ("--port", "9000")),
        ((), ("--port=9000",)),
        (("--env=UVICORN_PORT=9000",), ()),
        (("--env=UVICORN_PORT=9000",), ("--port", "9001")),
        (("--env=PORT=9000",), ()),
        (("--env=PORT=",), ()),
        (("--env=PORT=", "--env=PORT_FILE=/tls/port"), ()),
        ((), ("--host", "127.0.0.1")),
        ((), ("--host", "::1")),
        (("--env=UVICORN_HOST=::",), ()),
        ((), ("--uds", "/tmp/service.sock")),
        (("--env=UVICORN_UDS=/tmp/service.sock",), ()),
        ((), TLS),
        (("--env=UVICORN_SSL_CERTFILE=/tls/certificate.pem", "--env=UVICORN_SSL_KEYFILE=/tls/key.pem"), ()),
        ((), (*TLS, "--ssl-ca-certs=/tls/ca.pem", "--ssl-cert-reqs=2")),
        (("--init",), ("--port", "9000")),
        ((), ("--root-path", "/api")),
        ((), ("--workers", "2")),
    ],
)
def test_health_check_asks_the_way_the_service_is_served(image, certificate, flags, arguments):
    sysctl = "--sysctl=net.ipv6.conf.lo.disable_ipv6=0"
    flags = ("--memory=256m", "--tmpfs=/tmp", sysctl, f"--volume={certificate}:/tls:ro", *flags)
    with image.container(*arguments, flags=flags, ready=False) as container:
        wait_until(lambda: container.said(STARTED) or not container.inspect("State.Running"))
        wait_until(lambda: check(container) == 0)
        if image.engine == "docker":
            wait_until(lambda: container.inspect("State.Health.Status") == "healthy")


def test_health_check_fails_where_nothing_serves(image):
    with image.container() as container:
        assert check(container) == 0
        assert check(container, "--env=UVICORN_PORT=1") == 1
        assert check(container, "--env=UVICORN_UDS=/tmp/none") == 1


@pytest.mark.parametrize(("path", "status"), [("/readyz", 0), ("/livez", 1)])
def test_health_check_looks_at_livez_alone(image, path, status):
    """A server that answers one path with 500, in the place of the service."""
    code = f"""
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(500 if self.path == "{path}" else 200)
        self.end_headers()
http.server.HTTPServer(("", 80), Handler).serve_forever()"""
    with image.container("-c", code, flags=("--entrypoint=python",), ready=False) as container:
        wait_until(lambda: container.python_says("import socket; print(socket.socket().connect_ex(('', 80)))") == "0")
        assert check(container) == status


SILENT = "import socket, threading; s = socket.create_server(('', 80)); threading.Event().wait()"


def test_health_check_kills_what_hangs_for_hang_seconds(image):
    """It accepts a connection and says nothing; an init is PID 1, since Python as PID 1 cannot be killed from inside."""
    flags = ("--init", "--entrypoint=python", "--env=HANG_SECONDS=1")
    with image.container("-c", SILENT, flags=flags, ready=False) as container:
        wait_until(lambda: check(container) and not container.inspect("State.Running"))
        assert container.inspect("State.ExitCode") == 137


def test_health_check_leaves_what_hangs_alone_unless_told(image):
    with image.container("-c", SILENT, flags=("--init", "--entrypoint=python"), ready=False) as container:
        wait_until(lambda: container.python_says("import socket; print(socket.socket().connect_ex(('', 80)))") == "0")
        assert check(container) == 1
        assert container.inspect("State.Running")


def test_health_check_loads_no_package(image):
    """It runs every ten seconds: what it loads is a part of what the service loads, and no package."""
    code = "import runpy, sys; sys.argv = ['x']; runpy.run_path('/usr/local/bin/healthcheck.py')"
    with image.container() as container:
        command = ("python", "-IS", "-X", "importtime", "-c", code)
        result = subprocess.run(
            [image.engine, "exec", container.id, *command], capture_output=True, text=True, check=False
        )
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "socket" in loaded
    assert not {"site", "ssl", "asyncio", "fastapi", "json"} & loaded
