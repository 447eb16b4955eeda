"""What the container promises: its rights, its health check, its stop, its restart."""

import asyncio
import json
import subprocess

import httpx
import pytest

from tests.harness import LIMITS, Image, Load, answers, each_python, found, run, wait_until
from tests.test_servers import LIMIT, TABLE, TRACE, observe
from tests.test_stop import STREAM, STUCK


def test_container_runs_as_nobody_with_no_rights_in_a_root_that_is_read_only(image):
    with image.container() as container:
        status = dict(
            line.split(":\t", 1) for line in container.python_says("print(open('/proc/1/status').read())").splitlines()
        )
        command = container.python_says("print(open('/proc/1/cmdline').read().split(chr(0)))")
        with pytest.raises(AssertionError, match="Read-only file system"):
            container.python_says("open('/x', 'w')")
    assert command == "['python', '-m', 'main', '']"
    assert status["Uid"].split() == status["Gid"].split() == ["65532"] * 4
    assert (int(status["CapEff"], 16), status["NoNewPrivs"]) == (0, "1")


@pytest.mark.parametrize("flags", [("--user=12345",), ("--user=12345:678", "--env=PORT=8000")])
def test_container_runs_as_any_user(image, flags):
    with image.container(flags=flags, port=8000 if len(flags) > 1 else 80):
        pass


def test_container_needs_no_network(image):
    with image.container(flags=("--network=none",), ready=False) as container:
        code = "import httpx; print(httpx.get('http://127.0.0.1/').json())"
        wait_until(lambda: container.said("Uvicorn running"))
        assert container.python_says(code) == "{'Hello': 'World'}"


def test_container_is_healthy_while_it_serves(image):
    with image.container() as container:
        if image.engine == "docker":
            wait_until(lambda: container.inspect("State.Health.Status") == "healthy")
        else:
            run(image.engine, "healthcheck", "run", container.id)
        check = container.inspect("Config.Healthcheck.Test")[1:]
        assert subprocess.run([image.engine, "exec", container.id, *check], check=False).returncode == 0
        command = [image.engine, "exec", "--env", "PORT=1", container.id, *check]  # nothing serves there
        assert subprocess.run(command, capture_output=True, check=False).returncode != 0


FAILING = """
class Failing:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        fails = scope.get("path") == "{path}"
        await (Response(status_code=500) if fails else self.app)(scope, receive, send)


app.add_middleware(Failing)
"""


@pytest.mark.parametrize(("path", "status"), [("/readyz", 0), ("/livez", 1)])
def test_container_is_healthy_if_livez_succeeds(image, variant, path, status):
    source = variant()
    before, start, after = source.read_text().rpartition('if __name__ == "__main__":')
    source.write_text(before + FAILING.format(path=path) + start + after)
    with image.variant(source).container(ready=False) as container:
        wait_until(lambda: container.said("Uvicorn running"))
        command = [image.engine, "exec", container.id, *container.inspect("Config.Healthcheck.Test")[1:]]
        assert subprocess.run(command, capture_output=True, check=False).returncode == status


def test_container_stops_within_ten_seconds_by_default_whatever_is_open(image, variant):
    with (
        image.variant(variant(STREAM)).container() as container,
        httpx.stream("GET", container.url + "/stream") as response,
    ):
        chunks = response.iter_raw()
        assert next(chunks) == b"tick"
        status, seconds = container.stop()
    assert (status, seconds >= 8) == (0, True)  # 137 is that of what was killed


@pytest.mark.parametrize("workers", [1, 2])
def test_container_stops_cleanly_with_one_process_and_with_workers(image, workers):
    flags = ("--memory=256m", "--env=DRAIN_SECONDS=1")
    with image.container("--workers", str(workers), flags=flags) as container:
        wait_until(lambda: len(container.said("Application startup complete")) == workers)
        status, _ = container.stop()
        finished = container.said("Finished server process")
    assert (status, len(finished)) == (0, workers)


def take_steps_before_starting(image: Image, workers: int, *flags: str) -> tuple[int, str]:
    """The exit status, and the one message, if any."""
    command = (image.engine, "run", "--rm", *flags, image.name, "--workers", str(workers), "--prestart")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.returncode, json.loads(result.stdout)["message"] if result.stdout else ""


MEMORY = "WEB_CONCURRENCY=3 or --workers 3 needs 200 MB, the limit is 199 MB"
THREADS = "WEB_CONCURRENCY=3 or --workers 3 needs 320 threads, the limit is 256 threads"


@pytest.mark.parametrize(
    ("flag", "content", "refusal"),
    [
        ("--memory=190m", "", MEMORY),
        ("--volume={file}:/sys/fs/cgroup/memory.max:ro", "199229440\n", MEMORY),
        ("--pids-limit=256", "", THREADS),
        ("--volume={file}:/sys/fs/cgroup/pids.max:ro", "256\n", THREADS),
    ],
)
def test_steps_before_starting_refuse_more_workers_than_a_limit_holds(image, flag, content, refusal, tmp_path):
    """As cgroup v1 or v2 tells it, whichever this host has, and as a file in the place of v2's."""
    (file := tmp_path / "limit").write_text(content)
    flag = flag.format(file=file)
    assert take_steps_before_starting(image, 2, flag) == (0, "")
    assert take_steps_before_starting(image, 3, flag) == (1, refusal)


OCCUPY = """
import threading
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor

executor = ThreadPoolExecutor(32)  # as asyncio.to_thread has it on 28 cores or more


@app.get("/occupy/{workers}")
async def occupy(workers: int):
    # All threads wait at the barrier at the same time: those of `def` operations, and those of the executor.
    barrier = threading.Barrier(40 + 32)
    threads = [anyio.to_thread.run_sync(barrier.wait) for _ in range(40)]
    threads += [asyncio.get_running_loop().run_in_executor(executor, barrier.wait) for _ in range(32)]
    await asyncio.gather(*threads)
    # Then the event loop waits, so that the next connection is another worker's.
    Path(f"/tmp/occupied-{os.getpid()}").touch()
    while len([*Path("/tmp").glob("occupied-*")]) < workers:
        time.sleep(0.01)
"""


@each_python
@pytest.mark.parametrize(("memory", "workers"), [(LIMITS["memory"], 1), ("144m", 2)])
def test_workers_that_the_steps_before_starting_accept_have_all_their_threads(image, variant, memory, workers):
    """In the limits of `make run`, and in the least memory that holds two, on a machine of many cores."""
    limits = (f"--memory={memory}", f"--pids-limit={LIMITS['pids-limit']}")
    accepted = [take_steps_before_starting(image, count, *limits)[0] == 0 for count in (workers, workers + 1)]
    assert accepted == [True, False]

    async def occupy(url: str) -> set[int]:
        """Request until each worker has got one and all are answered."""
        requests: set[asyncio.Task[httpx.Response]] = set()
        async with httpx.AsyncClient(base_url=url) as client, asyncio.timeout(60):
            while not requests or not all(request.done() for request in requests):
                requests.add(asyncio.create_task(client.get(f"/occupy/{workers}", timeout=60)))
                await asyncio.wait(requests, timeout=1, return_when=asyncio.FIRST_EXCEPTION)
        return {request.result().status_code for request in requests}

    flags = (*limits, "--init", "--tmpfs=/tmp", "--env=MALLOC_ARENA_MAX=256")
    with image.variant(variant(OCCUPY)).container("--workers", str(workers), flags=flags) as container:
        wait_until(lambda: len(container.said("Application startup complete")) == workers)
        assert asyncio.run(occupy(container.url)) == {200}
        assert not container.inspect("State.OOMKilled")
        assert len(container.said("Started server process")) == workers


def test_container_restarts_after_its_process_was_killed(image):
    with image.container(flags=("--restart=unless-stopped",)) as container:
        container.kill()
        wait_until(lambda: container.inspect("RestartCount") == 1 and answers(container.url))


def test_container_trusts_forwarded_headers_as_told(image):
    headers = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "https"}
    for arguments, seen in (
        (["--proxy-headers", "--forwarded-allow-ips", "*"], "203.0.113.7"),
        (["--proxy-headers"], None),
    ):
        with image.container(*arguments) as container:
            httpx.get(container.url, headers=headers)
            (line,) = found(lambda: [line for line in container.logs() if "client.address" in line])
        assert (line["client.address"] == "203.0.113.7", line["url.scheme"]) == (
            (True, "https") if seen else (False, "http")
        )


def test_container_serves_below_a_prefix(image):
    with image.container("--root-path", "/api") as container:
        assert "url: '/api/openapi.json'" in httpx.get(container.url + "/docs").text


def test_container_refuses_to_start_when_an_import_fails(image, variant):
    with image.variant(variant("import nonsense")).container(ready=False) as container:
        wait_until(lambda: not container.inspect("State.Running"))
        assert container.inspect("State.ExitCode") == 1
        assert "nonsense" in container.logs()[-1]["message"]


def test_container_loses_no_request_when_it_is_stopped_under_load(image):
    async def stop(load: Load) -> None:
        await asyncio.to_thread(wait_until, lambda: load.answered > 500)
        process = await asyncio.create_subprocess_exec(image.engine, "stop", container.id, stdout=subprocess.DEVNULL)
        await load.watch()
        await process.wait()

    with image.container(flags=("--memory=128m",)) as container:
        load = Load(container.url, 32)
        asyncio.run(load.run(stop))
        assert container.inspect("State.ExitCode") == 0
    assert not load.lost


def test_container_keeps_what_the_table_of_servers_says(image, variant):
    flags = (f"--env=MAX_BODY_BYTES={LIMIT}", "--env=DRAIN_SECONDS=60")

    def terminate() -> None:
        run(image.engine, "kill", "--signal=TERM", container.id)

    def read_log() -> list[dict]:
        wait_until(lambda: not container.inspect("State.Running"))
        return container.logs()

    with image.variant(variant(TRACE)).container(flags=flags) as container:
        seen = observe(container.url, terminate, read_log)
    assert seen == {promise: servers["python main.py"] for promise, servers in TABLE.items()}


@pytest.mark.parametrize("what", [*STUCK])
def test_container_that_has_not_started_stops_at_once(image, variant, what):
    with image.variant(variant(STUCK[what])).container(ready=False) as container:
        wait_until(lambda: container.said("it begins"))
        run(image.engine, "stop", "--time=3600", container.id)
        assert container.inspect("State.ExitCode") == 143


@each_python
def test_container_has_what_packages_import_late(image):
    assert image.python_says("from pydantic.v1 import BaseModel; print(BaseModel.__name__)").endswith("BaseModel")
