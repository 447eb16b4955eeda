"""A stack of deploy/compose.yaml, for the tests that ask it."""

import itertools
import json
import os
import random
import shutil
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.harness import HERE, NAME, WORKER, Container, free_port, run

# Of a stack's network; each process of pytest has numbers of its own.
NUMBERS = itertools.count(16 * random.randrange(90) + WORKER, 16)


class Member(Container):
    """A container of a stack."""

    def healthy(self) -> bool:
        return self.inspect("State.Health.Status") == "healthy"


class Stack:
    """What deploy/up makes of a copy of deploy/ with these knobs, and with another main.py in every replica."""

    def __init__(self, directory: Path, image: str, source: Path | None = None, **knobs: str) -> None:
        self.directory = shutil.copytree(HERE / "deploy", directory / "deploy", symlinks=True)
        number = next(NUMBERS)
        self.name, self.image, self.prefix = f"{NAME}-compose-{number}", image, knobs.get("PREFIX", "")
        self.http_port, self.https_port = free_port(), free_port()
        ports = {"HTTP_PORT": str(self.http_port), "HTTPS_PORT": str(self.https_port)}
        network = f"10.{90 + number // 250}.{number % 250}"
        self.environment = os.environ | ports | {"NAME": self.name, "IMAGE": image, "NETWORK": network} | knobs
        self.url = f"https://localhost:{self.https_port}{self.prefix}"
        self.override("proxy", f'ports: !override ["127.0.0.1:{self.http_port}:80", "127.0.0.1:{self.https_port}:443"]')
        if source:
            for name in ("prestart", "service"):
                self.override(name, f'volumes: ["{source}:/app/main.py:ro"]')

    def override(self, service: str, line: str) -> None:
        """Add to a service what its user adds to his own copy."""
        file = self.directory / "compose.override.yaml"
        text = file.read_text() if file.exists() else "services:\n"
        file.write_text(f"{text}  {service}: {{ {line} }}\n")

    def keep(self, setting: str, secret: str) -> None:
        (self.directory / "settings.env").write_text(f"# a comment\nHELLO={setting}\n")
        (self.directory / "secrets/database_url").write_text(secret)

    def update(self) -> str:
        return run("./up", cwd=self.directory, env=self.environment)

    def compose(self, *arguments: str) -> str:
        return run("docker", "compose", *arguments, cwd=self.directory, env=self.environment)

    def containers(self, *services: str) -> list[Member]:
        return [Member("docker", id_) for id_ in self.compose("ps", "--all", "--quiet", *services).splitlines()]

    def access(self, path: str) -> list[dict]:
        """The access lines of this path, of all replicas."""
        lines = map(json.loads, self.compose("logs", "--no-log-prefix", "service").splitlines())
        return [line for line in lines if line.get("url.path") == self.prefix + path]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=False, timeout=60)

    def serves(self) -> bool:
        with self.client() as client:
            return client.get("/livez").status_code == 200

    @contextmanager
    def up(self):
        try:
            self.update()
            yield self
        finally:
            self.compose("--profile", "*", "down", "--timeout", "0", "--volumes")
