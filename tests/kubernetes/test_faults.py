"""What may be repeated is not lost to a replica or a node that dies or freezes, behind Traefik's own route."""

import time

import pytest

from tests.harness import wait_until
from tests.kubernetes.cluster import Copy, away, kubectl, on_node, served

AWAY = 40  # seconds for which a node is dead or frozen
HOLD = 2  # seconds for which a replica that accepts and says nothing holds a request: transport.yaml
LONGEST = 5  # seconds that a request may take while a node is frozen


def killed(copy: Copy, pod: str, node: str) -> None:
    """As the kernel would, from outside of the pod: in it the service is process 1, which nothing kills."""
    ours = f"grep -qz HOSTNAME={pod} /proc/$id/environ"
    on_node(node, f"for id in $(pgrep -f 'python -m main'); do if {ours}; then kill -9 $id; fi; done")


def out_of_memory(copy: Copy, pod: str, _: str) -> None:
    copy.ask(pod, "/fill")


@pytest.mark.parametrize("fault", [killed, out_of_memory])
def test_nothing_is_lost_to_a_replica_that_is(shop, fault):
    pod, before = shop.steadiest(), shop.restarts()
    with served(shop, f"a replica {fault.__name__.replace('_', ' ')}") as load:
        fault(shop, pod, shop.pods()[pod])
        wait_until(lambda: shop.restarts() != before)
    assert load.lost == []


def test_nothing_is_lost_to_a_deadlocked_replica_but_what_it_holds(shop):
    pod, before = shop.steadiest(), shop.restarts()
    with served(shop, "a replica deadlocked") as load:
        shop.ask(pod, "/block")
        wait_until(lambda: shop.restarts() != before)
    assert [request for request in load.lost if request.seconds < HOLD] == []
    assert len(load.lost) <= 20


@pytest.fixture
def node(shop) -> str:
    """A node with one of the two replicas, and without the way into the cluster."""
    shop.spread()
    ways = kubectl("get", "pods", "--namespace=traefik", "--output=jsonpath={.items[*].spec.nodeName}").split()
    return next(node for node in shop.pods().values() if node not in ways)


def test_nothing_is_lost_to_a_dead_node(shop, node):
    with served(shop, f"a node dead for {AWAY} s") as load, away(node, "kill"):
        time.sleep(AWAY)
    assert load.lost == []


def test_little_is_lost_to_a_frozen_node_and_nothing_hangs(shop, node):
    with served(shop, f"a node frozen for {AWAY} s") as load, away(node, "pause"):
        time.sleep(AWAY)
    assert len(load.lost) <= 20
    assert max(request.seconds for request in load.requests) < LONGEST
