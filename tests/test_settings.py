"""What the settings promise: a wrong one ends the start with a sentence, and flags win over variables."""

import json
import os
import socket
import sys
from unittest.mock import patch

import httpx
import pytest
from pydantic import BaseModel

import main
from tests.harness import Process, free_port, frozen, load, write_variant

SECRET = """
class Settings(BaseModel):
    hello: str = "World"
    token: int = 0
"""


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"DRAIN_SECONDS": "abc"}, ["DRAIN_SECONDS=abc", "valid number"]),
        ({"DRAIN_SECONDS": "-1"}, ["DRAIN_SECONDS=-1", "greater than or equal to 0"]),
        ({"PORT": "99999"}, ["PORT=99999", "less than or equal to 65535"]),
        ({"LOG_LEVEL": "loud"}, ["LOG_LEVEL=loud", "'critical'", "'info'"]),
        ({"WEB_CONCURRENCY": "many"}, ["WEB_CONCURRENCY=many", "valid integer"]),
        ({"WEB_CONCURRENCY": "0"}, ["WEB_CONCURRENCY=0", "greater than or equal to 1"]),
        ({"MAX_BODY_BYTES": "1.5"}, ["MAX_BODY_BYTES=1.5", "valid integer"]),
        ({"PORT": "80", "PORT_FILE": "secret"}, ["PORT and PORT_FILE are both set"]),
        ({"LOG_LEVEL_FILE": "secret"}, ["LOG_LEVEL_FILE=", "'critical'"]),
    ],
)
def test_bad_setting_is_one_sentence_that_names_it(in_folder, environment, names):
    """An exception for who imports main.py; the end of the start where it runs itself, as below."""
    with patch.dict(os.environ, environment), pytest.raises(ValueError) as caught:
        load(frozen())
    assert all(name in str(caught.value) for name in names), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"TOKEN": "s3cret"}, ["TOKEN: ", "valid integer"]),
        ({"TOKEN_FILE": "secret"}, ["TOKEN_FILE=", "secret: ", "valid integer"]),
        ({"TOKEN": "s3cret", "TOKEN_FILE": "secret"}, ["TOKEN and TOKEN_FILE are both set"]),
        ({"TOKEN_FILE": "missing"}, ["TOKEN_FILE=", "missing: ", "No such file"]),
        ({"TOKEN_FILE": "."}, ["TOKEN_FILE=", "Is a directory"]),
        ({"TOKEN_FILE": "latin"}, ["TOKEN_FILE=", "latin: ", "utf-8"]),
    ],
)
def test_bad_setting_of_yours_is_one_sentence_that_does_not_show_the_secret(in_folder, variant, environment, names):
    with patch.dict(os.environ, environment), pytest.raises(ValueError) as caught:
        load(variant(SECRET))
    assert all(name in str(caught.value) for name in names), caught.value
    assert "s3cret" not in str(caught.value)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A folder of files to read settings from."""
    (tmp_path / "secret").write_text("s3cret\n")
    (tmp_path / "latin").write_bytes(b"s3cret \xff")
    monkeypatch.chdir(tmp_path)


REFUSED = [
    ({"DRAIN_SECONDS": "abc"}, [], ["DRAIN_SECONDS=abc", "valid number"]),
    ({"TOKEN": "s3cret"}, [], ["TOKEN: ", "valid integer"]),
    ({"UVICORN_PORT": "tcp://10.0.0.1:80"}, [], ["--port", "'tcp://10.0.0.1:80'", "valid integer"]),
    ({}, ["--log-level", "loud"], ["--log-level", "'loud'", "'info'"]),
    ({}, ["--prot", "80"], ["--prot", "--port"]),
    ({}, ["nonsense"], ["nonsense"]),
    ({}, ["--header", "nonsense"], ["--header", "'nonsense'"]),
    ({}, ["--header", "nonsense", "--workers", "2"], ["--header", "'nonsense'"]),
    ({"UVICORN_SSL_CERTFILE": "nonsense"}, ["--workers", "2"], ["--ssl-certfile", "'nonsense'"]),
]
# Starts main.py again and again, since the packages that it imports take most of a start.
STARTS = """
import json, logging, os, runpy, sys
source, starts = sys.argv[1:]
clean = dict(os.environ)
for environment, arguments in json.loads(starts):
    os.environ.clear()
    os.environ.update(clean | environment)
    sys.argv = [source, *arguments]
    try:
        runpy.run_path(source, run_name="__main__")
    except SystemExit as end:
        logging.shutdown()
        print(json.dumps({"message": "the end", "status": end.code}), flush=True)
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> list[list[dict]]:
    """What each of these starts says; in its last line, how it ends."""
    source = write_variant(tmp_path_factory.mktemp("refused") / "main.py", SECRET)
    starts = json.dumps([start for *start, _ in REFUSED])
    process = Process(starts, command=(sys.executable, "-c", STARTS), source=source)
    process.end()
    said: list[list[dict]] = [[]]
    for line in process.lines:
        said[-1].append(line)
        if "status" in line:
            said.append([])
    return said


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_bad_setting_or_option_ends_the_start_with_one_sentence_that_names_it(refused, number):
    line, end = refused[number]
    *_, names = REFUSED[number]
    assert (line["level"], end["status"]) == ("critical", 1)
    assert all(name in line["message"] for name in names), line
    assert "s3cret" not in str(line)
    assert "exception.stacktrace" not in line


def test_start_that_ends_with_a_sentence_has_failed():
    process = Process("--header", "nonsense")
    assert process.end() == 1
    (line,) = process.lines
    assert line["level"] == "critical"


@pytest.mark.parametrize("arguments", [[], ["--workers", "2"]])
def test_taken_port_ends_with_one_sentence_that_names_it(arguments):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        process = Process(*arguments, PORT=port)
        assert process.end() != 0
    (line,) = (line for line in process.lines if line["level"] in {"error", "critical"})
    assert "address already in use" in line["message"].lower()


def test_command_line_wins_over_uvicorns_variable_and_that_over_ours():
    wanted, other = str(free_port()), str(free_port())
    for arguments, variable in ((["--port", wanted], other), ([], wanted)):
        process = Process(*arguments, UVICORN_PORT=variable, PORT=other, DRAIN_SECONDS="0")
        process.wait_for(f"Uvicorn running on http://127.0.0.1:{wanted} ")
        process.terminate()


def test_timeouts_fit_into_each_other():
    """A load balancer's idle time is 60 s by custom; Docker kills after 10 s."""
    defaults = main.ServerSettings()
    assert defaults.timeout_keep_alive > 60
    assert defaults.drain_seconds + defaults.timeout_graceful_shutdown < 10 - 1


@pytest.mark.parametrize("name", [*main.ServerSettings.model_fields])
def test_each_setting_may_come_from_a_file(name, tmp_path, monkeypatch):
    default = getattr(main.ServerSettings(), name)
    other = "debug" if name == "log_level" else default + 1
    file = tmp_path / name
    file.write_text(f"{other}\n")
    monkeypatch.setenv(f"{name.upper()}_FILE", str(file))
    assert getattr(main.read_environment(main.ServerSettings, shows_values=True), name) == other


def test_setting_of_yours_comes_from_a_file(variant, tmp_path):
    file = tmp_path / "hello"
    file.write_text("Moon\n")
    with Process(source=variant(SECRET), HELLO_FILE=str(file)) as process:
        assert httpx.get(process.url).json() == {"Hello": "Moon"}


def test_setting_that_is_called_a_file_is_none_for_its_neighbour(monkeypatch):
    class Paths(BaseModel):
        data: str = "inside"
        DATA_FILE: str = ""

    monkeypatch.setenv("DATA_FILE", "/nonexistent")
    paths = main.read_environment(Paths, shows_values=False)
    assert (paths.data, paths.DATA_FILE) == ("inside", "/nonexistent")


@pytest.mark.parametrize("level", ["INFO", "Warning"])
def test_log_level_is_read_in_any_case(monkeypatch, level):
    monkeypatch.setenv("LOG_LEVEL", level)
    assert main.read_environment(main.ServerSettings, shows_values=True).log_level == level.lower()


def test_file_may_be_imported_anew_with_another_setting(monkeypatch):
    """As `importlib.reload` does it: the names of the first time are still there."""
    module = load(frozen())
    monkeypatch.setenv("HELLO", "Moon")
    assert module.__spec__ is not None
    assert module.__spec__.loader is not None
    module.__spec__.loader.exec_module(module)
    assert module.settings.hello == "Moon"
