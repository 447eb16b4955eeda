"""A pytest plugin: main.py's middlewares around each app that is tested, main.py's protocol in the place of uvicorn's."""

import asyncio
import functools
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.testclient import TestClient
from uvicorn.protocols.http import httptools_impl

sys.path.append(str(Path(__file__).parents[2]))  # at the end, since the suites have a folder named `tests`, too
import main


def surround(framework: Any) -> None:
    """Put main.py's middlewares before an app's own, for each app of this class that a TestClient has got."""
    build = framework.build_middleware_stack

    @functools.wraps(build)
    def build_surrounded(app: Any) -> Any:
        own = app.user_middleware
        if getattr(app, "in_test_client", False) and app is not main.app:
            app.user_middleware = [*main.app.user_middleware, *own]
        try:
            return build(app)
        finally:
            app.user_middleware = own

    framework.build_middleware_stack = build_surrounded


def mark_apps(client: Any) -> None:
    """Mark each app that a client is made for; the apps that are mounted in it, or in something else, are not."""
    make = client.__init__

    @functools.wraps(make)
    def make_and_mark(self: Any, app: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(app, Starlette):
            app.in_test_client = True
        make(self, app, *args, **kwargs)

    client.__init__ = make_and_mark


surround(Starlette)
surround(FastAPI)
mark_apps(TestClient)
main.Http.__name__ = "HttpToolsProtocol"  # since uvicorn's tests skip, by this name, what its own does not do either
vars(httptools_impl)["HttpToolsProtocol"] = main.Http  # where uvicorn and its tests find it


def pytest_configure() -> None:
    if not main.app.user_middleware:
        raise pytest.UsageError("main.app has no middlewares: nothing would be around what is tested.")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Give the stand-ins of uvicorn's tests what each transport and each loop of asyncio has, beside what they have."""
    if tests := sys.modules.get("tests.protocols.test_http"):
        transport, loop, peer = tests.MockTransport, tests.MockLoop, socket.socket()
        session.config.add_cleanup(peer.close)
        answer, run_task = transport.get_extra_info, loop.run_one
        transport.get_extra_info = lambda self, key: peer if key == "socket" else answer(self, key)
        transport.can_write_eof = lambda self: False
        transport.writelines = lambda self, lines: self.write(b"".join(lines))
        loop.call_soon = lambda self, *call: asyncio.get_running_loop().call_soon(*call)

        async def run_one(self: Any) -> Any:
            result = await run_task(self)
            await asyncio.sleep(0)  # for what was to be called soon
            return result

        loop.run_one = run_one
