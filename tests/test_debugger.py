"""What `make profile` and `make debug` show of a running service that keeps its strict settings."""

import pytest

from tests.harness import HERE, NAME, answers, make, run, wait_until

BUSY = """
import threading
@app.get("/burn")
def burn() -> None:
    count = 0
    while True:
        count += 1
threading.Thread(target=burn, daemon=True, name="busy").start()
"""


@pytest.fixture(params=[(), ("--init",)], ids=["alone", "init"])
def busy(request, image, variant):
    """A strict container whose service burns CPU in a function of that name; its name in the engine, and itself."""
    flags = ("--tmpfs=/tmp", "--memory=128m", *request.param)
    with image.variant(variant(BUSY)).container(flags=flags) as container:
        yield container.inspect("Name").lstrip("/"), container


def test_profile_shows_where_the_time_goes(busy, tmp_path):
    name, container = busy
    graph = tmp_path / "profile.html"
    status, output = make("profile", f"ENGINE={container.engine}", f"NAME={name}", "SECONDS=2", f"PROFILE={graph}")
    assert status == 0, output
    first = output.partition("filename:lineno(function)")[2].splitlines()[1]
    assert "(burn)" in first, output
    assert "burn" in graph.read_text()


def test_debugger_stops_the_service_and_lets_it_run_on(busy):
    name, container = busy
    commands = "p 'the sum is', 6 * 7\nq\n"
    assert "('the sum is', 42)" in run(
        "make", "debug", f"ENGINE={container.engine}", f"NAME={name}", cwd=HERE, input=commands
    )
    wait_until(lambda: answers(container.url))


@pytest.mark.parametrize("target", ["profile", "debug"])
def test_nothing_to_look_into_is_one_sentence(engine, target):
    status, output = make(target, f"ENGINE={engine}", f"NAME={NAME}-none")
    assert status != 0
    assert output.startswith(f"Nothing runs in {engine} as {NAME}-none: `make run` starts it.")
