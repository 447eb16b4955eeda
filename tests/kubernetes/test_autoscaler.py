"""Load that rises brings replicas, load that falls takes them back, and what a replica serves is a figure."""

from tests.harness import wait_until
from tests.kubernetes.cluster import Copy, served
from tests.kubernetes.load import RATE


def cpu(copy: Copy) -> float:
    """Cores that all replicas together use, as the autoscaler sees it."""
    lines = copy.kubectl("top", "pods", copy.replicas, "--no-headers").splitlines()
    return sum(int(line.split()[1].removesuffix("m")) for line in lines) / 1000


def test_replicas_follow_the_load_and_none_of_it_is_lost(first):
    first.kubectl("set", "resources", first.deployment, "--requests=cpu=80m")  # so that this load is much for two
    first.autoscale()
    first.kubectl("rollout", "status", first.deployment)
    with served(first, "load that rises") as load:
        wait_until(lambda: len(first.pods()) > 2, 180)
        used = cpu(first)
        load.next("load that falls")
        load.rate = RATE / 15
        wait_until(lambda: len(first.pods()) == 2, 180)
    print(f"{RATE} requests a second took {used:.2f} cores: {RATE / used:.0f} a second and core")
    assert load.lost == []
