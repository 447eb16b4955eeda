"""What `python main.py` promises as a process: command line, output, answers on the wire."""

import subprocess
import sys
from urllib.parse import urlsplit

import httpx
import pytest

from tests.harness import UV, Process, answers, wait_until, write_variant


def test_help_and_version_are_text_and_need_no_setting_of_yours(variant):
    source = variant("class Settings(Settings):\n    token: str\n")
    help_, version = (
        subprocess.run([sys.executable, source, option], capture_output=True, text=True, check=True).stdout
        for option in ("--help", "--version")
    )
    assert help_.startswith("Usage: main.py [OPTIONS]")
    assert version.startswith("Running uvicorn")


def test_uv_run_serves():
    with Process(command=(UV, "run", "--quiet", "--no-project", "--python", sys.executable)) as process:
        assert httpx.get(process.url + "/").json() == {"Hello": "World"}


def test_answers_carry_the_headers_that_browsers_obey_and_do_not_name_the_server(service):
    headers = httpx.get(service.url + "/docs").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("default-src 'self'")
    assert "http" not in headers["content-security-policy"]
    assert "server" not in headers


def test_reload_serves_the_change_and_does_not_drain(variant):
    source = variant()
    with Process("--reload", "--reload-dir", str(source.parent), source=source) as process:
        wait_until(lambda: source.touch() or process.said("Reloading"))  # nothing else tells that it watches the file
        write_variant(source, '@app.get("/again")\nasync def again() -> None: ...')
        wait_until(lambda: answers(process.url, "/again"))
    assert process.said("Shutting down in 0 s")


def test_steps_before_starting_take_options_as_the_service_does():
    process = Process("--prestart", "--timeout-graceful-shutdown", "600", "--log-level", "debug")
    assert (process.end(), process.lines) == (0, [])


@pytest.mark.parametrize("definition", ["def", "async def"])
def test_steps_before_starting_that_would_not_run_have_not_succeeded(variant, definition):
    process = Process("--prestart", source=variant(f"{definition} prestart():\n    yield"))
    assert process.end() == 1
    assert [line["message"] for line in process.lines] == ["prestart: a `yield` in it keeps its steps from running"]


@pytest.mark.parametrize(
    ("definition", "level", "said"),
    [("def", "debug", ["debug", "info", "warning"]), ("async def", "warning", ["warning"])],
)
def test_steps_before_starting_log_at_their_level_and_may_be_async(variant, definition, level, said):
    code = f"""
{definition} prestart():
    for level in ("debug", "info", "warning"):
        getattr(container_log, level)("a step")
"""
    process = Process("--prestart", source=variant(code), LOG_LEVEL=level)
    assert process.end() == 0
    assert [line["level"] for line in process.said("a step")] == said


def test_reload_by_its_variable_does_not_drain(variant):
    source = variant()
    arguments = ("--reload-dir", str(source.parent))
    with Process(*arguments, source=source, UVICORN_RELOAD="true", DRAIN_SECONDS="60") as process:
        process.terminate()
    assert process.said("Shutting down in 0 s")


def test_lifespan_that_is_off_leaves_the_service_ready_and_its_connections_open():
    with (
        Process("--lifespan", "off", "--limit-max-requests", "9999") as process,
        httpx.Client(base_url=process.url) as client,
    ):
        assert client.get("/readyz").status_code == 200
        assert "connection" not in client.get("/").headers
        process.terminate()
    assert process.said("Finished server process")
    assert [line["level"] for line in process.said("without a drain")] == ["warning", "warning"]


def test_other_protocol_says_at_the_start_which_limits_do_not_hold():
    with Process("--http", "h11") as process:
        assert httpx.get(process.url).status_code == 200
    assert process.wait_for("--http h11")["level"] == "warning"
    with Process("--http", "h11", LOG_LEVEL="error", DRAIN_SECONDS="0") as process:
        process.terminate()
    assert not process.lines


@pytest.mark.parametrize("workers", ["1", "2"])
def test_every_address_is_ipv4_and_ipv6(workers):
    with Process("--host", "::", "--workers", workers) as process:
        port = urlsplit(process.url).port
        for host in ("127.0.0.1", "[::1]"):
            assert httpx.get(f"http://{host}:{port}/items/5").status_code == 200
