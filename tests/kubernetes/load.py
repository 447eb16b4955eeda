"""Clients of a deployment: so many requests a second over HTTPS, a quarter of them on connections of their own."""

import asyncio
import os
import ssl
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

RATE = int(os.environ.get("RATE", "300"))  # requests a second; fewer for a machine that is busy with other things
PATIENCE = (
    6  # seconds; what waits longer is as good as lost, and so many connections are a burden to the engine's proxy
)
BODY = b'{"item_id":5,"q":"somequery"}'


@dataclass
class Request:
    sent: float
    seconds: float
    error: str | None


class Load:
    """Sends while the `with` block runs. An answer that is not the right one, or none in time, is a lost request."""

    def __init__(self, url: str, what: str, rate: float = RATE) -> None:
        self.port, self.host, self.rate = urlsplit(url).port, urlsplit(url).hostname, rate
        self.requests: list[Request] = []
        self.parts: list[tuple[float, str]] = [(0, what)]
        self.idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.tls = ssl.create_default_context()
        self.tls.check_hostname, self.tls.verify_mode = False, ssl.CERT_NONE
        self.over = False
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over = True
        self.thread.join()

    @property
    def lost(self) -> list[Request]:
        return [request for request in self.requests if request.error]

    def next(self, what: str) -> None:
        """What is done to the deployment from now on, for the report."""
        self.parts.append((time.monotonic(), what))

    def report(self) -> str:
        """For each part: requests sent in it, those of them that were lost, and the longest that one took."""
        lines, ends = [], [start for start, _ in self.parts[1:]] + [float("inf")]
        for (start, what), end in zip(self.parts, ends, strict=True):
            requests = [request for request in self.requests if start <= request.sent < end]
            lost, longest = [r for r in requests if r.error], max(r.seconds for r in requests)
            lines.append(f"{what}: {len(requests)} requests, {len(lost)} lost, the longest took {longest:.1f} s")
            lines += [f"    sent after {r.sent - start:.2f} s, {r.seconds:.2f} s later {r.error}" for r in lost[:5]]
        return "\n".join(lines)

    async def run(self) -> None:
        number, due = 0, time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while not self.over:
                tasks.create_task(self.request(number % 4 == 0))
                number, due = number + 1, max(due + 1 / self.rate, time.monotonic() - 1)
                await asyncio.sleep(due - time.monotonic())
        for _, writer in self.idle:
            writer.transport.abort()
        await asyncio.sleep(0.1)  # in which the event loop closes them

    async def request(self, alone: bool) -> None:
        sent, error = time.monotonic(), None
        try:
            async with asyncio.timeout(PATIENCE):
                await self.exchange(alone)
        except (OSError, asyncio.IncompleteReadError, ValueError) as problem:
            error = repr(problem)
        self.requests.append(Request(sent, time.monotonic() - sent, error))

    async def exchange(self, alone: bool) -> None:
        pooled = self.idle.pop() if self.idle and not alone else None
        reader, writer = pooled or await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.tls, server_hostname=self.host
        )
        try:
            writer.write(f"GET /items/5?q=somequery HTTP/1.1\r\nHost: {self.host}\r\n\r\n".encode())
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
            if (head[:12], body) != (b"http/1.1 200", BODY):
                raise ValueError(head[:12] + b" " + body)
            if not alone and b"connection: close" not in head:
                self.idle.append((reader, writer))
                return
        except BaseException:
            writer.transport.abort()
            raise
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
