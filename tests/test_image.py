"""What the image promises, on each Python that it can be built from."""

import json
import re
from pathlib import Path

import httpx
import pytest
import trustme

import main
from tests.harness import (
    HERE,
    NAME,
    PYTHONS,
    Image,
    answers,
    check_contract,
    check_size,
    copy_project,
    each_python,
    run,
    scan,
    wait_until,
)

LEFT_OUT = {
    "idlelib",
    "tkinter",
    "turtle",
    "curses",
    "_curses",
    "_curses_panel",
    "turtledemo",
    "ensurepip",
    "pydoc_data",
    "venv",
    "_pydatetime",
    "_pydecimal",
    "_pyio",
}


def test_dockerfile_builds_the_first_python_unless_asked():
    assert f"ARG PYTHON={PYTHONS[0]}\n" in (HERE / "Dockerfile").read_text()


def test_dockerfile_passes_the_builders_own_check(engine):
    if engine != "docker":
        pytest.skip("Podman's build has no check")
    assert "no warnings found" in run(engine, "build", "--check", HERE)


@each_python
@pytest.mark.contract
def test_image_holds_the_contract(image):
    """With main.py as it is in the image."""
    with Image(image.engine, image.python, image.name).container() as container:
        check_contract(container.url)


@each_python
def test_image_has_no_shell_and_no_tool_but_python(image, files):
    programs = {path for path, file in files.items() if file.isfile() and file.mode & 0o111}
    programs = {path for path in programs if not re.search(r"\.py$|\.so(\.|$)", path)}
    of_packages = {f"/usr/local/bin/{name}" for name in ("fastapi", "httpx", "idna", "uvicorn")}  # in Python
    assert programs - of_packages == {f"/usr/local/bin/python{image.python}", "/sbin/ldconfig"}
    assert not [
        path for path in files if re.search(r"/(pip|ensurepip|apt|dpkg)(/|$|-)", path) and "/var/lib" not in path
    ]


@each_python
def test_image_belongs_to_root_and_nobody_can_write_to_it(files):
    """But to /tmp, and to /data, whose owner and mode a new volume takes over."""
    files = dict(files)
    data = files.pop("/data")
    assert (data.uid, data.gid, oct(data.mode)) == (65532, 65532, "0o755")
    assert {(file.uid, file.gid) for file in files.values()} == {(0, 0)}
    assert not [path for path, file in files.items() if file.mode & 0o6000 and path != "/tmp"]
    writable = {path: oct(file.mode) for path, file in files.items() if file.mode & 0o022 and not file.issym()}
    assert writable == {"/tmp": "0o1777"}


@each_python
def test_image_is_compiled_and_keeps_its_sources(image, files):
    tag = image.python.replace(".", "")
    sources = [Path(path) for path in files if path.startswith("/usr/local/lib") and path.endswith(".py")]
    assert len(sources) > 900
    for source in sources:
        assert str(source.parent / "__pycache__" / f"{source.stem}.cpython-{tag}.pyc") in files


@each_python
def test_image_has_the_whole_standard_library_otherwise(image):
    """Compared with the official image, module by module; both lack what is of other systems."""
    code = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
def fails(name):
    try: importlib.import_module(name)
    except ImportError: return True
print(*(name for name in sorted(sys.stdlib_module_names - {"antigravity", "this"}) if fails(name)))
"""
    official = run(image.engine, "run", "--rm", f"python:{image.python}-slim", "python", "-c", code)
    assert set(image.python_says(code).split()) - set(official.split()) <= LEFT_OUT


@each_python
def test_image_starts_main_py_from_its_compiled_form(image):
    said = run("sh", "-c", f"{image.engine} run --rm --entrypoint=python {image.name} -v -m main --version 2>&1")
    assert re.search(r"/app/__pycache__/main\.cpython-\d+\.pyc matches /app/main\.py", said)


@each_python
def test_image_has_what_the_c_library_and_packages_look_for(image):
    assert (
        image.python_says("""
import certifi, ctypes, ctypes.util, datetime, getpass, grp, locale, os, platform, pwd, socket, sqlite3, ssl, sys, tempfile, zoneinfo
assert ctypes.CDLL(ctypes.util.find_library("c")).getpid() == 1
assert pwd.getpwuid(65532).pw_name == getpass.getuser() == "nonroot" and grp.getgrgid(65532).gr_name == "nonroot"
assert socket.getaddrinfo("localhost", 80) and socket.getservbyname("https") == 443
assert len(ssl.create_default_context().get_ca_certs()) > 100
assert os.path.samefile(certifi.where(), os.environ["SSL_CERT_FILE"])
assert str(datetime.datetime(2026, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")).utcoffset()) == "2:00:00"
assert len(zoneinfo.available_timezones()) > 400
assert platform.freedesktop_os_release()["ID"] == "debian"
assert sqlite3.connect(":memory:").execute("select 1").fetchone() == (1,)
assert sys.getfilesystemencoding() == sys.stdout.encoding == locale.getpreferredencoding() == "utf-8"
with tempfile.TemporaryFile() as file: file.write(b"x")
print("é")""")
        == "é"
    )


@each_python
def test_image_speaks_tls_to_a_server_with_a_certificate(image, tmp_path):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("service.example").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "server.pem"))
    code = """
import http.server, httpx, ssl, threading
server = http.server.HTTPServer(("127.0.0.1", 443), http.server.SimpleHTTPRequestHandler)
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain("/tls/server.pem")
server.socket = context.wrap_socket(server.socket, server_side=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(httpx.get("https://service.example/").status_code)"""
    flags = ["--add-host=service.example:127.0.0.1", f"--volume={tmp_path}:/tls:ro", "--user=0"]
    assert image.python_says(code, *flags, "--env=SSL_CERT_FILE=/tls/ca.pem") == "200"
    with pytest.raises(AssertionError, match="CERTIFICATE_VERIFY_FAILED"):
        image.python_says(code, *flags)


@each_python
def test_image_names_itself(image):
    with image.container(ready=False) as container:
        labels = container.inspect("Config.Labels")
    label = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert label["title"] == re.findall(r"^NAME += (.*)", (HERE / "Makefile").read_text(), re.MULTILINE)[0]
    assert label["version"] == main.app.version
    assert label["licenses"] == "MIT-0"
    assert label["revision"].removesuffix("-dirty") == run("git", "rev-parse", "HEAD", cwd=HERE)
    assert label["created"] == run("git", "log", "-1", "--format=%cI", cwd=HERE)
    assert label["base.name"] == f"python:{image.python}-slim"
    assert re.fullmatch("sha256:[0-9a-f]{64}", label["base.digest"])
    assert "description" in label
    assert ("source" in label) is bool(run("git", "remote", cwd=HERE))


@each_python
def test_scanner_finds_every_package_that_is_there(image, files, tmp_path):
    """syft's list against Debian's own record of each file, and against Python's of its packages."""
    names = {"dpkg-db-cataloger": set(), "python-installed-package-cataloger": set()}
    for package in scan(image.archive, tmp_path / "root"):
        names.setdefault(package["foundBy"], set()).add(package["name"])
    debian = [path for path, file in files.items() if file.isfile() and re.match("/(lib|lib64|sbin|usr/share)/", path)]
    search = run(
        *(image.engine, "run", "--rm", "--interactive", f"python:{image.python}-slim"),
        *("bash", "-c", "xargs realpath | xargs dpkg --search | cut -d: -f1 | sort -u"),
        input="\n".join(debian),
    )
    assert names["dpkg-db-cataloger"] == set(search.split()) | {"base-files", "ca-certificates", "netbase"}
    code = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    assert names["python-installed-package-cataloger"] == {
        name.lower().replace("_", "-") for name in image.python_says(code).split()
    }


@each_python
def test_image_takes_any_package_with_the_libraries_that_it_links(image, tmp_path):
    """numpy brings its libraries; greenlet links the C++ library of the system, which comes along by itself."""
    copy_project(tmp_path)
    source = (HERE / "main.py").read_text().replace('"fastapi",', '"fastapi", "greenlet", "numpy",')
    (tmp_path / "main.py").write_text(source)
    name = f"{NAME}-packages"
    run("make", "lock", "build", f"ENGINE={image.engine}", f"BASE_PYTHON={image.python}", f"IMAGE={name}", cwd=tmp_path)
    code = "import numpy, greenlet; print(numpy.eye(3).dot(numpy.ones(3)).sum(), greenlet.greenlet(lambda: 7).switch())"
    assert Image(image.engine, image.python, name).python_says(code, "--read-only") == "3.0 7"


@each_python
def test_edit_of_main_py_rebuilds_one_layer(image, tmp_path):
    copy_project(tmp_path)

    def build() -> list[str]:
        run(
            "make",
            "build",
            f"ENGINE={image.engine}",
            f"BASE_PYTHON={image.python}",
            f"IMAGE={image.name}-edit",
            cwd=tmp_path,
        )
        return json.loads(
            run(image.engine, "image", "inspect", "--format", "{{json .RootFS.Layers}}", f"{image.name}-edit")
        )

    before = build()
    with open(tmp_path / "main.py", "a") as source:
        source.write("# edited\n")
    after = build()
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


@each_python
def test_image_is_as_small_as_it_was(image, files):
    check_size(image, image.archive)


@each_python
def test_new_volume_at_data_is_writable_and_so_is_home(image):
    """SQLite in a read-only container; HOME is a /tmp that the container bounds."""
    code = """
import os, pathlib, sqlite3
with sqlite3.connect("/data/service.db") as database:
    database.execute("create table if not exists seen (id)")
    database.execute("insert into seen values (1)")
    (count,), = database.execute("select count(*) from seen")
(pathlib.Path.home() / "cache").write_text("x")
print(count, os.environ["HOME"], os.statvfs("/tmp").f_blocks * os.statvfs("/tmp").f_frsize)"""
    volume = f"{NAME}-data-{image.python}"
    flags = ("--read-only", "--tmpfs=/tmp:size=64m", "--cap-drop=ALL", f"--volume={volume}:/data")
    run(image.engine, "volume", "rm", "--force", volume)
    try:
        assert [image.python_says(code, *flags) for _ in range(2)] == [f"{n} /tmp 67108864" for n in (1, 2)]
    finally:
        run(image.engine, "volume", "rm", volume)


@each_python
def test_imports_of_code_without_a_name_and_of_what_may_be_missing_are_as_written(image):
    """Jinja2 runs templates without a name; what is imported inside `try` is missed there, one module further, too."""
    code = """
import sys
space = {}
exec("import json, wave", space)
print("wave" in sys.modules)
from uvicorn.supervisors import ChangeReload
print(ChangeReload.__module__)"""
    assert image.python_says(code).split() == ["True", "uvicorn.supervisors.statreload"]


@each_python
def test_fastapi_knows_a_model_of_pydantic_v1_without_importing_it_to_ask(image):
    code = """
import sys, types, warnings
import main
from fastapi.encoders import jsonable_encoder
jsonable_encoder(types.SimpleNamespace())
print("pydantic.v1" in sys.modules)
warnings.simplefilter("ignore")
from pydantic.v1 import BaseModel
try:
    jsonable_encoder(BaseModel())
except Exception as error:
    print(type(error).__name__)"""
    assert image.python_says(code).split() == ["False", "PydanticV1NotSupportedError"]


def test_reload_serves_a_change_in_a_mounted_folder(image, variant):
    source = variant("")
    source.parent.chmod(0o755)
    plain = Image(image.engine, image.python, image.name)
    with plain.container("--reload", flags=(f"--volume={source.parent}:/app:ro", "--memory=256m")) as container:
        assert httpx.get(container.url).json() == {"Hello": "World"}
        source.write_text(source.read_text().replace("Greeting(Hello=settings.hello)", 'Greeting(Hello="change")'))
        wait_until(lambda: answers(container.url, "/", '{"Hello":"change"}'))
