"""The README's table of timeouts is true, and their order holds."""

import re

import main
from test_main import HERE

COMPOSE, STACK, KUBERNETES = (
    (HERE / f"deploy/{name}.yaml").read_text().lower() for name in ("compose", "stack", "kubernetes")
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


def unready(text: str) -> float:
    return seconds(text, r"healthcheck\.interval:") + seconds(text, r"healthcheck\.timeout:")


def test_timeouts_are_as_the_readme_says_and_fit_into_each_other():
    settings = main.Settings()
    (options,) = re.findall(r"^HEALTHCHECK (.*)", (HERE / "Dockerfile").read_text(), re.MULTILINE)
    drain, graceful, stop = settings.drain_seconds, settings.timeout_graceful_shutdown, settings.stop_seconds
    idle = seconds(COMPOSE, "idleconntimeout=")
    wait, interval = seconds(options, "--timeout="), seconds(options, "--interval=")
    kubernetes_drain, kubernetes_stop = (
        seconds(KUBERNETES, "name: drain_seconds"),
        seconds(KUBERNETES, "\n      terminationgraceperiodseconds:"),
    )
    assert [
        float(number) for number in re.findall(r"^\| (\d+) \| ", (HERE / "README.md").read_text(), re.MULTILINE)
    ] == [
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
    assert drain + graceful + 1 < stop == seconds(COMPOSE, r"stop_grace_period: \${stop_seconds:-")
    assert (
        stop
        == seconds(STACK, r"stop_grace_period: \${stop_seconds:-")
        == seconds(STACK, r"\bstop_seconds: \${stop_seconds:-")
    )
    assert seconds(STACK, "idleconntimeout=") == idle < settings.timeout_keep_alive
    assert wait < interval
    assert limit("readinessprobe") < kubernetes_drain
    assert kubernetes_drain + graceful + 1 < kubernetes_stop == seconds(KUBERNETES, "name: stop_seconds")
    assert limit("livenessprobe") < limit("startupprobe")
