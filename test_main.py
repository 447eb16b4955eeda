"""The contract of your service: of main.py in this process, or by `make smoke` of whatever answers at URL.

Your routes come first. What follows holds for any service, so leave it as it is.
"""

import os
import re
import socket
import threading
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import httpx
import pytest
import uvicorn


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


# --- Of any service ---


@pytest.fixture(scope="module")
def url():
    """URL; without one, the address at which this process serves main.py meanwhile."""
    if url := os.environ.get("URL"):
        yield url
        return
    import main

    server = uvicorn.Server(uvicorn.Config(main.app, log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()  # what is asked before it is ready waits in the listener
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def client(url):
    try:
        # What answers on this host has a certificate of its own making: a name that no authority gives one for.
        verify = httpx.URL(url).host not in {"localhost", "127.0.0.1"}
        with httpx.Client(base_url=url, verify=verify, timeout=10) as client:
            client.get("/livez")
            yield client
    except (httpx.TransportError, httpx.InvalidURL) as error:
        pytest.exit(f"Nothing answers at {url} ({error}). `make run` starts the service; URL= names another.", 1)


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes_succeed_without_a_body_too_and_are_never_cached(client, path):
    for response in (client.get(path), client.head(path)):
        assert (response.status_code, response.headers["cache-control"]) == (200, "no-store")


def test_unknown_path_is_not_found(client):
    response = client.get("/there/is/no/such/path")
    assert (response.status_code, response.json()) == (404, {"detail": "Not Found"})


class Links(HTMLParser):
    """What a browser would load for a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found = set(re.findall(r"(?:url|Url): '([^']+)'", page))
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found |= {value for name, value in attrs if name in {"src", "href", "spec-url"}}


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_documentation_comes_whole_and_from_this_host_alone(client, path):
    page = client.get(path)
    links = {urljoin(str(page.url), link) for link in Links(page.text).found}
    assert (page.status_code, len(links) > 1) == (200, True)
    for link in links:
        assert urlsplit(link)[:2] == (page.url.scheme, page.url.netloc.decode())
        assert client.get(link).status_code == 200
