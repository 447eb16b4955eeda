"""What deploy/compose.yaml promises where a replica hangs, grows or dies."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.compose import Stack
from tests.harness import wait_until

FATAL = """
import os, time
from fastapi import Request
@app.post("/hang")
async def hang():
    time.sleep(600)
@app.post("/grow")
async def grow():
    return len(b"x" * 2**30)
@app.api_route("/die/{replica}", methods=["GET", "POST"])
async def die(replica: str, request: Request) -> str:
    print(request.method, "has begun", flush=True)
    if os.uname().nodename == replica:
        os.kill(os.getpid(), 9)
    return "done"
"""


@pytest.mark.parametrize("cause", ["kill", "grow", "hang"])
def test_compose_serves_at_once_and_again_after(cause, deployed, variant, tmp_path):
    stack = Stack(tmp_path, deployed, variant(FATAL), REPLICAS="1", HANG_SECONDS="3")
    with stack.up(), stack.client() as client, ThreadPoolExecutor() as pool:
        assert stack.serves()
        (replica,) = stack.containers("service")
        if cause == "kill":
            replica.kill()
        else:
            pool.submit(client.post, f"/{cause}")
        seconds = wait_until(lambda: replica.inspect("RestartCount") and stack.serves())
    print(f"{cause}: the only replica serves again after {seconds:.1f} s")


@pytest.mark.parametrize(("method", "statuses", "times"), [("GET", [200, 200], 3), ("POST", [200, 502], 2)])
def test_compose_repeats_a_request_that_a_replica_died_of_unless_it_may_have_had_its_effect(
    method, statuses, times, deployed, variant, tmp_path
):
    """Of two requests, one for each replica, one kills its replica."""
    with Stack(tmp_path, deployed, variant(FATAL)).up() as stack, stack.client() as client:
        path = f"/die/{stack.containers('service')[0].id[:12]}"
        assert sorted(client.request(method, path).status_code for _ in range(2)) == statuses
        assert stack.compose("logs", "service").count(f"{method} has begun") == times
