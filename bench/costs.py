"""What is measured once: how much longer the first answer takes, what a record of the log costs, little memory."""

import statistics
import time
from contextlib import suppress
from http.client import HTTPConnection

from bench.contenders import FIRST, GROWN, ITEM, MEMORY, RECORD, REQUESTS, Contender
from bench.images import Found
from bench.steps import Wrk, resident_megabytes, running, started
from tests.harness import wait_until

STARTS = 3  # of which the median counts
TURNS = 2  # of a second with the log, and as many without


def first_answer(contender: Contender) -> Found:
    """The time of a new container's first answer, as a multiple of what the last ten of a hundred took."""
    return {FIRST: statistics.median(first_of_hundred(contender) for _ in range(STARTS))}


def first_of_hundred(contender: Contender) -> float:
    with running(contender) as container:
        client = HTTPConnection(container.address, contender.port)
        wait_until(lambda: connects(client))
        first, *others = [seconds(client) for _ in range(100)]
        client.close()
    return first / statistics.median(others[-10:])


def connects(client: HTTPConnection) -> bool:
    with suppress(OSError):
        client.connect()
    return client.sock is not None


def seconds(client: HTTPConnection) -> float:
    """Until an item is answered."""
    start = time.monotonic()
    client.request("GET", ITEM)
    response = client.getresponse()
    response.read()
    assert response.status == 200, response.status
    return time.monotonic() - start


def record(logging: Contender, silent: Contender, wrk: Wrk) -> Found:
    """Microseconds of CPU that a request takes more with an access log than without; both run all the time."""
    with started(logging) as (with_log, _), started(silent) as (without, _):
        spent = [
            [wrk.send(one, ITEM, 64, 1).microseconds for one in (with_log, without)]
            for _ in range(TURNS + 1)  # the first is to warm up
        ]
    more = statistics.fmean(one - other for one, other in spent[1:])
    assert more > 0, f"{more:.1f} µs: something else used this machine, more without the log"
    return {RECORD: more}


def little_memory(contender: Contender, wrk: Wrk) -> Found:
    """What many requests leave of the memory that a container is limited to; one that is killed fails this step."""
    with started(contender, f"--memory={MEMORY}m") as (container, _):
        pid, answered = container.inspect("State.Pid"), 0
        ready = resident_megabytes(pid)
        while answered < REQUESTS:
            answered += wrk.send(container, ITEM, 64, 1).requests
        return {GROWN: resident_megabytes(pid) / ready}
