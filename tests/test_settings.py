"""What the settings promise: a wrong one ends the start with a sentence, and flags win over variables."""

import socket

import pytest

import main
from tests.harness import Process, free_port


@pytest.mark.parametrize(
    ("environment", "arguments", "names"),
    [
        ({"DRAIN_SECONDS": "abc"}, [], ["DRAIN_SECONDS=abc", "valid number"]),
        ({"DRAIN_SECONDS": "-1"}, [], ["DRAIN_SECONDS=-1", "greater than or equal to 0"]),
        ({"PORT": "99999"}, [], ["PORT=99999", "less than or equal to 65535"]),
        ({"LOG_LEVEL": "loud"}, [], ["LOG_LEVEL=loud", "'critical'", "'info'"]),
        ({"WEB_CONCURRENCY": "many"}, [], ["WEB_CONCURRENCY=many", "valid integer"]),
        ({"MAX_BODY_BYTES": "1.5"}, [], ["MAX_BODY_BYTES=1.5", "valid integer"]),
        ({"UVICORN_PORT": "tcp://10.0.0.1:80"}, [], ["--port", "'tcp://10.0.0.1:80'", "valid integer"]),
        ({"WEB_CONCURRENCY": "0"}, [], ["WEB_CONCURRENCY=0", "greater than or equal to 1"]),
        ({}, ["--log-level", "loud"], ["--log-level", "'loud'", "'info'"]),
        ({}, ["--prot", "80"], ["--prot", "--port"]),
        ({}, ["nonsense"], ["nonsense"]),
        ({}, ["--header", "nonsense"], ["--header", "'nonsense'"]),
        ({}, ["--header", "nonsense", "--workers", "2"], ["--header", "'nonsense'"]),
        ({"UVICORN_SSL_CERTFILE": "nonsense"}, ["--workers", "2"], ["--ssl-certfile", "'nonsense'"]),
    ],
)
def test_bad_setting_ends_with_one_sentence_that_names_it(environment, arguments, names):
    process = Process(*arguments, **environment)
    assert process.end() == 1
    (line,) = process.lines
    assert line["level"] == "critical"
    assert all(name in line["message"] for name in names), line
    assert "exception.stacktrace" not in line


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
