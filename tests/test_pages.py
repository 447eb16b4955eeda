"""What the documentation pages promise: they work in a browser that reaches nothing but the service, below a prefix, too.

`make test TESTS=tests/test_pages.py SCREENSHOTS=docs` writes the pictures of docs/behaviour.md.
"""

import base64
import json
import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests import harness
from tests.harness import Image, missing, run

NAME = f"{harness.NAME}-pages"
SITES = ("http://proxy/api", "http://service")
BROWSER = """
FROM python:3.14-slim
RUN apt-get update && apt-get install --yes --no-install-recommends chromium curl fonts-dejavu-core
RUN pip install playwright==1.65.2
"""
# Runs beside the browser: opens the page, does what the test wants, and prints what the browser saw.
VISIT = """
import base64, json, sys
from playwright.sync_api import sync_playwright

url, code = sys.argv[1:]
seen = {"requests": [], "problems": []}
with sync_playwright() as playwright:
    # Its sandbox needs rights that a container does not have; the container is one.
    browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
    page = browser.new_page(viewport={"width": 900, "height": 600})
    page.set_default_timeout(15000)
    page.on("request", lambda request: seen["requests"].append(request.url))
    page.on("requestfailed", lambda request: seen["problems"].append(f"{request.url}: {request.failure}"))
    page.on("console", lambda m: seen["problems"].append(m.text) if m.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: seen["problems"].append(str(error)))
    page.goto(url, wait_until="networkidle")
    exec(code)
    seen["picture"] = base64.b64encode(page.screenshot()).decode()
    browser.close()
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def visit(engine, tmp_path_factory):
    """The service, and the same below /api behind a proxy that strips the prefix, on a network without a way out."""
    if engine != "docker":
        missing("the proxy's image is Docker's")
    image = Image.build(engine)
    service = (*image.flags, image.name)
    run(engine, "build", "--tag", f"{NAME}:browser", "-", input=BROWSER)
    routes = tmp_path_factory.mktemp("proxy") / "routes.yaml"
    routes.write_text("""http:
  routers: {service: {rule: PathPrefix(`/api`), service: service, middlewares: [strip, open]}}
  middlewares: {strip: {stripPrefix: {prefixes: [/api]}}, open: {headers: {accessControlAllowOriginList: ["*"]}}}
  services: {service: {loadBalancer: {servers: [{url: http://prefixed}]}}}
""")
    routes.chmod(0o644)
    start = (engine, "run", "--detach", f"--network={NAME}", "--network-alias")
    beside = (engine, "run", "--rm", f"--network={NAME}", "--shm-size=256m", f"{NAME}:browser")
    ask = (*beside, "curl", "--silent", "--fail", "--retry", "60", "--retry-delay", "1", "--retry-all-errors")
    proxy = ("traefik:v3", "--entrypoints.http.address=:80", "--providers.file.filename=/routes.yaml")

    def visit(site: str, page: str, code: str, *others: str) -> dict:
        """What the browser saw: nothing went wrong, and nothing was asked of any host but these others."""
        seen = json.loads(run(*beside, "python", "-c", VISIT, site + page, code))
        hosts = {urlsplit(url).hostname for url in seen["requests"] if urlsplit(url).scheme not in {"data", "blob"}}
        assert (hosts, seen["problems"]) == ({urlsplit(site).hostname, *others}, [])
        if directory := os.environ.get("SCREENSHOTS"):
            (Path(directory) / f"{page.strip('/')}.png").write_bytes(base64.b64decode(seen["picture"]))
        return seen

    clean = f"{engine} rm --force {NAME}-service {NAME}-prefixed {NAME}-proxy; {engine} network rm --force {NAME}"
    run("sh", "-c", clean)  # what a run that was cut off has left
    run(engine, "network", "create", "--internal", NAME)
    try:
        run(*start, "service", f"--name={NAME}-service", *service)
        run(*start, "prefixed", f"--name={NAME}-prefixed", *service, "--root-path", "/api")
        run(*start, "proxy", f"--name={NAME}-proxy", f"--volume={routes}:/routes.yaml:ro", *proxy)
        for site in SITES:
            run(*ask, f"{site}/readyz")
        yield visit
    finally:
        run("sh", "-c", clean)


@pytest.mark.parametrize("site", SITES)
def test_docs_execute_an_operation(visit, site):
    code = """
page.get_by_text("Say hello").wait_for()
page.get_by_text("Read an item").click()
page.get_by_role("button", name="Try it out").click()
page.get_by_placeholder("item_id").fill("5")
page.get_by_placeholder("q", exact=True).fill("somequery")
page.get_by_role("button", name="Execute").click()
answer = page.locator(".live-responses-table .response")
answer.wait_for()
seen["status"] = answer.locator(".response-col_status").inner_text()
seen["answer"] = answer.locator(".highlight-code code").first.inner_text()
answer.scroll_into_view_if_needed()
"""
    seen = visit(site, "/docs", code)
    assert (seen["status"].split()[0], json.loads(seen["answer"])) == ("200", {"item_id": 5, "q": "somequery"})


def test_docs_may_try_out_a_server_elsewhere(visit):
    code = """seen["answer"] = page.evaluate("fetch('http://proxy/api/items/5').then(answer => answer.json())")"""
    assert visit("http://service", "/docs", code, "proxy")["answer"] == {"item_id": 5, "q": None}


@pytest.mark.parametrize("site", SITES)
def test_redoc_shows_the_operations(visit, site):
    code = 'seen["headings"] = [h.inner_text().strip() for h in page.locator("h2").all()]'
    seen = visit(site, "/redoc", code)
    assert {"Say hello", "Read an item"} <= {*seen["headings"]}
