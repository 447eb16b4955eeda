"""What the documents promise: their tables and figures are those of the files that they speak of."""

import re

import main
from tests.harness import HERE, LIMITS


def test_readme_lists_every_setting_with_its_default():
    rows = re.findall(r"^\| `(\w+)` \| `(\S+)` \|", (HERE / "README.md").read_text(), re.MULTILINE)
    fields = main.ServerSettings.model_fields.items()
    assert rows == [(name.upper(), str(field.default)) for name, field in fields]


COMPOSE, STACK, KUBERNETES = (
    (HERE / f"deploy/{name}.yaml").read_text().lower() for name in ("compose", "stack", "kubernetes/base/deployment")
)
UNITS = {"ms": 0.001, "s": 1}


def seconds(text: str, pattern: str) -> float:
    """What follows this pattern, each time the same: a number, without a unit in seconds."""
    ((number, unit),) = {*re.findall(pattern + r"\D*?(\d+)(ms|s)?\b", text)}
    return int(number) * UNITS[unit or "s"]


def limit(probe: str) -> float:
    """How long a probe of the manifest may fail."""
    (part,) = re.findall(rf"{probe}:\n(?: {{12}}.*\n)+", KUBERNETES)
    return seconds(part, " periodseconds:") * seconds(part, "failurethreshold:")


def test_limits_are_the_same_wherever_they_are_set_and_as_the_documents_say():
    for file in ("deploy/compose.yaml", "deploy/stack.yaml", "deploy/stack"):
        text = (HERE / file).read_text()
        assert {*re.findall(r"\$\{MEMORY:-(\w+)\}", text)} == {LIMITS["memory"]}, file
        assert {*re.findall(r"pids(?:[-_]limit)?:? (\d+)", text)} == {LIMITS["pids-limit"]}, file
    memory, threads = LIMITS["memory"].replace("m", " MB"), LIMITS["pids-limit"]
    table = (HERE / "docs/deployments.md").read_text()
    assert f"\n| memory limit of a replica | {memory} | {memory} | {memory} |\n" in table
    assert f"\n| limit of its threads | {threads} | {threads} | the node's |\n" in table
    assert f"\n{memory} and {threads} threads," in (HERE / "docs/limits.md").read_text()


def unready(text: str) -> float:
    return seconds(text, r"healthcheck\.interval:") + seconds(text, r"healthcheck\.timeout:")


def test_timeouts_are_as_the_documents_say_and_fit_into_each_other():
    settings = main.ServerSettings()
    (options,) = re.findall(r"^HEALTHCHECK (.*)", (HERE / "Dockerfile").read_text(), re.MULTILINE)
    drain, graceful = settings.drain_seconds, settings.timeout_graceful_shutdown
    stop = seconds(COMPOSE, r"stop_grace_period: \${stop_seconds:-")
    idle = seconds(COMPOSE, "idleconntimeout=")
    wait, interval = seconds(options, "--timeout="), seconds(options, "--interval=")
    kubernetes_drain, kubernetes_stop = (
        seconds(KUBERNETES, "name: drain_seconds"),
        seconds(KUBERNETES, "\n      terminationgraceperiodseconds:"),
    )
    table = (HERE / "docs/deployments.md").read_text().partition("## Timeouts")[2]
    assert [float(number) for number in re.findall(r"^\| ([\d.]+) \| ", table, re.MULTILINE)] == [
        unready(COMPOSE),
        unready(STACK),
        drain,
        graceful,
        stop,
        idle,
        settings.timeout_keep_alive,
        wait,
        interval,
        limit("readinessprobe"),
        kubernetes_drain,
        kubernetes_stop,
        limit("livenessprobe"),
        limit("startupprobe"),
    ]
    assert max(unready(COMPOSE), unready(STACK)) < drain
    assert drain + graceful + 1 < stop == seconds(STACK, r"stop_grace_period: \${stop_seconds:-")
    assert seconds(STACK, "idleconntimeout=") == idle < settings.timeout_keep_alive
    assert wait < interval
    assert limit("readinessprobe") < kubernetes_drain
    assert kubernetes_drain + graceful + 1 < kubernetes_stop
    assert limit("livenessprobe") < limit("startupprobe")
