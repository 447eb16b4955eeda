"""What the documentation pages promise: they work in a browser that reaches nothing but the service, below a prefix, too.

`SCREENSHOTS=deploy make test` writes the pictures of the README.
"""

import base64
import json
import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from test_main import HERE, PYTHONS, run

pytest_plugins = ("test_main",)  # for its fixtures
NAME = "fastapi-container-pages-test"
BROWSER = """
FROM python:3.14-slim
RUN apt-get update && apt-get install --yes --no-install-recommends chromium fonts-dejavu-core
RUN pip install playwright==1.65.2
"""
# Runs beside the browser: opens the page, does what the test wants, and prints what the browser saw.
VISIT = """
import base64, json, sys
from playwright.sync_api import sync_playwright

url, code = sys.argv[1:]
seen = {"requests": [], "problems": []}
with sync_playwright() as playwright:
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
def sites(engine, tmp_path_factory):
    """The service, and the same below /api behind a proxy that strips the prefix, on a network without a way out."""
    service = f"{NAME}:{PYTHONS[0]}"
    run("make", "build", f"ENGINE={engine}", f"IMAGE={service}", cwd=HERE)
    run(engine, "build", "--tag", f"{NAME}:browser", "-", input=BROWSER)
    routes = tmp_path_factory.mktemp("proxy") / "routes.yaml"
    routes.write_text("""http:
  routers: {service: {rule: PathPrefix(`/api`), service: service, middlewares: [strip]}}
  middlewares: {strip: {stripPrefix: {prefixes: [/api]}}}
  services: {service: {loadBalancer: {servers: [{url: http://prefixed}]}}}
""")
    routes.chmod(0o644)
    start = (engine, "run", "--detach", f"--network={NAME}", "--network-alias")
    containers = []
    run(engine, "network", "create", "--internal", NAME)
    try:
        containers.append(run(*start, "service", service))
        containers.append(run(*start, "prefixed", service, "--root-path", "/api"))
        proxy = ("traefik:v3", "--entrypoints.http.address=:80", "--providers.file.filename=/routes.yaml")
        containers.append(run(*start, "proxy", f"--volume={routes}:/routes.yaml:ro", *proxy))
        wait = "from urllib.request import urlopen; import sys, time\nfor url in sys.argv[1:]:\n for _ in range(200):\n"
        wait += "  try: urlopen(url); break\n  except OSError: time.sleep(0.1)\n else: sys.exit(url)"
        urls = {"": "http://service", "/api": "http://proxy/api"}
        browse = (engine, "run", "--rm", f"--network={NAME}", "--shm-size=256m", f"{NAME}:browser", "python", "-c")
        run(*browse, wait, *(f"{url}/readyz" for url in urls.values()))
        yield lambda prefix, page, code: json.loads(run(*browse, VISIT, urls[prefix] + page, code))
    finally:
        run(engine, "rm", "--force", "--volumes", *containers)
        run(engine, "network", "rm", NAME)


def check(seen: dict, name: str) -> None:
    """Nothing went wrong, and nothing was asked of another host; its picture goes where SCREENSHOTS says."""
    origins = {urlsplit(url)[:2] for url in seen["requests"] if urlsplit(url).scheme not in {"data", "blob"}}
    assert (len(origins), seen["problems"]) == (1, [])
    if directory := os.environ.get("SCREENSHOTS"):
        (Path(directory) / name).write_bytes(base64.b64decode(seen["picture"]))


@pytest.mark.parametrize("prefix", ["/api", ""])
def test_docs_execute_an_operation(sites, prefix):
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
    seen = sites(prefix, "/docs", code)
    assert (seen["status"].split()[0], json.loads(seen["answer"])) == ("200", {"item_id": 5, "q": "somequery"})
    check(seen, "docs.png")


@pytest.mark.parametrize("prefix", ["/api", ""])
def test_redoc_shows_the_operations(sites, prefix):
    code = 'seen["headings"] = [h.inner_text().strip() for h in page.locator("h2").all()]'
    seen = sites(prefix, "/redoc", code)
    assert {"Say hello", "Read an item"} <= {*seen["headings"]}
    check(seen, "redoc.png")
