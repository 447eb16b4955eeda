# /// script
# requires-python = ">=3.11"
# dependencies = ["pytest==9.2.0", "trustme==1.2.1"]
# ///
"""The contract of the service, in-process or, by `make smoke`, wherever URL says."""

import asyncio
import os
import re
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import httpx
import pytest

# The knob of `make smoke`, which main, when it is imported, would take for its setting.
os.environ.pop("PORT", None)
import main


class InProcess(httpx.BaseTransport):
    """httpx's ASGI transport for its synchronous client, with the app's lifespan around it."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.asgi = httpx.ASGITransport(main.service)
        self.runner.run(self.start())

    async def start(self) -> None:
        self.events, started = asyncio.Queue(), asyncio.Queue()
        self.lifespan = asyncio.create_task(main.service({"type": "lifespan"}, self.events.get, started.put))
        await self.events.put({"type": "lifespan.startup"})
        assert await started.get() == {"type": "lifespan.startup.complete"}

    async def end(self) -> None:
        await self.events.put({"type": "lifespan.shutdown"})
        await self.lifespan

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def respond() -> httpx.Response:
            response = await self.asgi.handle_async_request(request)
            return httpx.Response(response.status_code, headers=response.headers, content=await response.aread())

        return self.runner.run(respond())

    def close(self) -> None:
        self.runner.run(self.end())
        self.runner.close()


@pytest.fixture(scope="module")
def client():
    url = os.environ.get("URL")
    transport = None if url else InProcess()
    try:
        # What answers on this host has a certificate of its own making: a name that no authority gives one for.
        verify = httpx.URL(url or "").host not in {"localhost", "127.0.0.1"}
        client = httpx.Client(base_url=url or "http://in-process", transport=transport, verify=verify, timeout=10)
        client.get("/livez")
    except (httpx.TransportError, httpx.InvalidURL) as error:
        pytest.exit(f"Nothing answers at {url} ({error}). `make run` starts the service; URL= names another.", 1)
    yield client
    client.close()


def test_root_says_hello(client):
    response = client.get("/")
    assert (response.status_code, response.json()) == (200, {"Hello": "World"})


@pytest.mark.parametrize(
    ("path", "item"),
    [
        ("/items/5?q=somequery", {"item_id": 5, "q": "somequery"}),
        ("/items/5", {"item_id": 5, "q": None}),
        ("/items/-7?q=", {"item_id": -7, "q": ""}),
        ("/items/5?q=%C3%A9%20%26", {"item_id": 5, "q": "é &"}),
    ],
)
def test_item_is_given_back(client, path, item):
    response = client.get(path)
    assert (response.status_code, response.json()) == (200, item)


def test_item_id_is_a_number(client):
    response = client.get("/items/foo")
    (problem,) = response.json()["detail"]
    assert (response.status_code, problem["type"], problem["loc"]) == (422, "int_parsing", ["path", "item_id"])


def test_unknown_path_and_method(client):
    assert (client.get("/nothing").status_code, client.get("/nothing").json()) == (404, {"detail": "Not Found"})
    assert (client.post("/items/5").status_code, client.post("/items/5").headers["allow"]) == (405, "GET")


@pytest.mark.parametrize("path", ["/", "/livez", "/readyz"])
def test_head_is_answered_like_get_without_a_body(client, path):
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.headers["content-length"]) == (200, get.headers["content-length"])


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_succeed_and_are_never_cached(client, path):
    response = client.get(path)
    assert (response.status_code, response.headers["cache-control"]) == (200, "no-store")


def test_every_operation_is_described(client):
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {"/", "/items/{item_id}"}
    for operations in schema["paths"].values():
        for operation in operations.values():
            assert operation["summary"]
            model = operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
            assert all(field["examples"] for field in schema["components"]["schemas"][model]["properties"].values())


class Links(HTMLParser):
    """What a browser would load for a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found = set(re.findall(r"(?:url|Url): '([^']+)'", page))
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found |= {value for name, value in attrs if name in {"src", "href", "spec-url"}}


@pytest.mark.parametrize(("path", "parts"), [("/docs", 4), ("/redoc", 3)])
def test_documentation_comes_whole_and_from_this_host_alone(client, path, parts):
    page = client.get(path)
    links = {urljoin(str(page.url), link) for link in Links(page.text).found}
    assert (page.status_code, len(links)) == (200, parts)
    for link in links:
        assert urlsplit(link)[:2] == (page.url.scheme, page.url.netloc.decode())
        assert client.get(link).status_code == 200
