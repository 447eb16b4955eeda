"""What ends a build, each with a sentence: what is missing, what was renamed, and line ends of another system."""

import base64
import gzip
import hashlib
import http.server
import re
import shutil
import ssl
import subprocess
import tarfile
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest
import trustme

from tests.harness import HERE, NAME, PYTHONS, copy_five, make, missing, run

# A package's extension, as if it needed a library of this name.
NEEDS = r"""
RUN sed 's/libuuid\.so\.1/libnone.so.1/' /usr/local/lib/python3.??/lib-dynload/_uuid.*.so \
    > /tmp/needs.so && mv -t /usr/local/lib/python3.??/site-packages /tmp/needs.so"""
UNRECORDED = r"""
RUN sed 's/libuuid\.so\.1/libnone.so.1/' /usr/lib/*/libuuid.so.1 > /usr/local/lib/libnone.so.1 && ldconfig"""
BROKEN = r"""
RUN echo 'raise ImportError("broken")' > /usr/local/lib/python3.??/site-packages/h11/__init__.py"""


@pytest.fixture
def build(engine, tmp_path):
    """Builds the five files, the Dockerfile changed; the exit status and what is printed."""

    def build(change, *knobs: str) -> tuple[int, str]:
        dockerfile = copy_five(tmp_path) / "Dockerfile"
        dockerfile.write_bytes(change(dockerfile.read_text()).encode())
        return make("build", f"ENGINE={engine}", f"IMAGE={NAME}-build", *knobs, folder=tmp_path)

    return build


def installs(lines: str):
    """A change of the Dockerfile: these lines follow the installation of the packages."""
    return lambda text: re.sub(r"(pip install .*\n)", lambda found: found[1] + lines + "\n", text, count=1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: text.replace("\n", "\r\n"), "The Dockerfile has CRLF line ends"),
        (lambda text: text.replace(" ensurepip ", " ensurepipe "), "cannot remove 'ensurepipe': No such file"),
        (lambda text: text.replace("uvloop/*.so", "uvloops/*.so"), "'uvloops/*.so': No such file"),
        (lambda text: text.replace("logo-mini", "logo-maxi"), "does not load https://cdn.redoc.ly/redoc/logo-maxi.svg"),
        (
            lambda text: text.replace("pydantic import v1", "pydantic import v9"),
            "FastAPI asks for pydantic.v1 in another",
        ),
        (installs(NEEDS), "A package needs libnone.so.1, which is not here: install the Debian package that has it"),
        (installs(NEEDS + UNRECORDED), "no path found matching pattern /usr/local/lib/libnone.so.1"),
        (installs(BROKEN), "cannot be imported in this image: ImportError('broken')"),
    ],
    ids=["crlf", "standard library", "extension", "picture", "pydantic", "library", "record", "import"],
)
def test_build_ends_with_a_sentence(build, change, sentence):
    status, output = build(change)
    assert status != 0
    assert sentence in output


@pytest.mark.check
def test_clone_with_git_for_windows_line_ends_has_those_of_this_project(tmp_path):
    run("git", "clone", "--quiet", "--config=core.autocrlf=true", "--config=core.eol=crlf", HERE, tmp_path / "clone")
    text = [path for path in (tmp_path / "clone").rglob("*") if path.is_file() and path.suffix not in {".png"}]
    assert [path.name for path in text if ".git" not in path.parts and b"\r\n" in path.read_bytes()] == []


# --- Behind a firewall ---

PASSWORD = "let-me-in-4711"


class Index(http.server.SimpleHTTPRequestHandler):
    """A package index that shows its folder to those who know the password."""

    def do_GET(self) -> None:
        kind, _, told = self.headers.get("Authorization", "").partition(" ")
        if kind == "Basic" and base64.b64decode(told).decode() == f"me:{PASSWORD}":
            return super().do_GET()
        self.send_response(401)
        self.send_header("WWW-Authenticate", "Basic")
        return self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index(tmp_path):
    """The port of a private index on this host, whose authority is in ca.pem; it has one package, named private."""
    folder = tmp_path / "index"
    wheel = folder / "simple/private/private-1.0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr("private.py", "ANSWER = 42\n")
        package.writestr("private-1.0.data/data/share/private/text", "42")
        package.writestr("private-1.0.data/scripts/pip-private", "#!python\n")
        package.writestr("private-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: private\nVersion: 1.0\n")
        package.writestr(
            "private-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        package.writestr("private-1.0.dist-info/RECORD", "private.py,,\n")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Index, directory=folder))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port, hashlib.sha256(wheel.read_bytes()).hexdigest()
    server.shutdown()
    thread.join()
    server.server_close()


def blobs(archive: Path):
    """All that an image holds: its configuration, its history, its labels, and each of its layers."""
    with tarfile.open(archive) as saved:
        for member in saved:
            if file := saved.extractfile(member):
                data = file.read()
                yield gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def test_private_index_with_a_password_and_an_authority_of_its_own_leaves_no_trace(engine, index, tmp_path):
    port, digest = index
    reach = f"import socket; socket.create_connection(('127.0.0.1', {port}))"
    beside = (engine, "run", "--rm", "--network=host", f"python:{PYTHONS[0]}-slim", "python", "-c", reach)
    if subprocess.run(beside, capture_output=True, check=False).returncode:
        missing("the engine is in a virtual machine, from which no build reaches this host's index")
    folder = tmp_path / "project"
    (folder / "deploy").mkdir(parents=True)
    shutil.copy2(HERE / "deploy/image.mk", folder / "deploy")
    with (copy_five(folder) / "requirements.txt").open("a") as lock:
        lock.write(f"private==1.0 --hash=sha256:{digest}\n")
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login me password {PASSWORD}\n")
    (tmp_path / "pip.conf").write_text(f"[global]\nextra-index-url = https://127.0.0.1:{port}/simple/\n")
    name = f"{NAME}-private"
    host = "BUILD_FLAGS=--network host"  # where the index is
    knobs = (f"ENGINE={engine}", f"IMAGE={name}", host, f"PIP_CONF={tmp_path}/pip.conf", f"CA_CERT={tmp_path}/ca.pem")
    assert make("build", *knobs, folder=folder)[0] != 0  # without the password
    status, output = make("build", *knobs, f"NETRC={tmp_path}/netrc", folder=folder)
    assert status == 0, output
    assert PASSWORD not in output
    code = "import private; print(private.ANSWER, *map(open, ('../share/private/text', 'pip-private')))"
    answer = run(engine, "run", "--rm", "--workdir=/usr/local/bin", "--entrypoint=python", name, "-c", code)
    assert answer.startswith("42 ")  # with all that its wheel has
    run(engine, "save", "--output", tmp_path / "image.tar", name)
    certificate = (tmp_path / "ca.pem").read_bytes().splitlines()[1]
    found = [
        secret
        for blob in blobs(tmp_path / "image.tar")
        for secret in (PASSWORD.encode(), certificate)
        if secret in blob
    ]
    assert found == []
