"""No request is lost to what is done to a deployment, behind any Ingress; a broken release is told, and goes back."""

from tests.harness import wait_until
from tests.kubernetes.cluster import Copy, kubectl, nodes, served


def drain(copy: Copy, node: str) -> None:
    """Only of this copy's pods: what else a node has, such as the way into the cluster, is not what is tested."""
    selector = f"--pod-selector=app.kubernetes.io/name={copy.name}"
    try:
        kubectl("drain", node, selector, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=120s")
    finally:
        kubectl("uncordon", node)


def scale(copy: Copy, count: int) -> None:
    """At once, and for the autoscaler, too, which would undo it."""
    copy.autoscale(minReplicas=count)
    copy.kubectl("scale", copy.deployment, f"--replicas={count}")
    wait_until(lambda: len(copy.pods()) == count)


def rollout(copy: Copy, verb: str) -> None:
    copy.kubectl("rollout", verb, copy.deployment)
    copy.kubectl("rollout", "status", copy.deployment, "--timeout=120s")


def change_a_setting(copy: Copy) -> None:
    before = copy.pods().keys()
    copy.set("LOG_LEVEL=debug")
    copy.deploy()
    assert not before & copy.pods().keys(), "the same replicas serve on"


def test_nothing_is_lost_to_what_is_done_on_purpose(first):
    with served(first, "rollout") as load:
        rollout(first, "restart")
        load.next("rollout undo")
        rollout(first, "undo")
        load.next("scaling from 2 to 5")
        scale(first, 5)
        load.next("scaling from 5 to 2")
        scale(first, 2)
        for node in nodes():
            load.next(f"drain of {node}")
            drain(first, node)
        load.next("a changed setting")
        change_a_setting(first)
    assert load.lost == []


NEVER_READY = """
import asyncio
@asynccontextmanager
async def never(app):
    await asyncio.sleep(3600)
    yield
app.router.lifespan_context = never
"""
FAILING_STEP = """
def prestart() -> None:
    raise OSError("the migration met a table that is not there")
"""


def broken(copy: Copy, what: str, image: str = "") -> str:
    """What `make deploy` says of a release that must fail; neither a replica before it nor a request is lost."""
    before = copy.pods().keys()
    with served(copy, what) as load:
        status, said = copy.make("deploy", image)
    assert status == 2, said  # make's own, for a recipe that has ended with 1
    assert copy.pods().keys() == before, said
    assert load.lost == []
    return said


def test_setting_that_is_wrong_is_told(first):
    with first.edited("settings.env", "HELLO=", "MAX_CONCURRENCY=none\nHELLO="):
        said = broken(first, "a setting that cannot start")
    assert "MAX_CONCURRENCY=none" in said
    assert "are as they were" in said


def test_step_before_starting_that_fails_is_told(first, variant):
    said = broken(first, "a step before starting that fails", variant(FAILING_STEP))
    assert "the migration met a table that is not there" in said
    assert "are as they were" in said


def test_release_that_is_never_ready_is_told_and_goes_back(first, variant):
    with first.edited("base/deployment.yaml", "progressDeadlineSeconds: 180", "progressDeadlineSeconds: 10"):
        said = broken(first, "an image that is never ready", variant(NEVER_READY))
    assert "Startup probe failed" in said
    assert "gone back to the one before it" in said
