"""What the five files promise where they are alone: every verb works, and a copy of them is a new service in a minute."""

import re
from pathlib import Path

import httpx
import pytest

from tests.harness import CONTAINER, NAME, copy_five, free_port, make, run

VERBS = ("build", "run", "smoke", "test", "lint", "stop")
ROUTE = '''
class Book(BaseModel):
    isbn: str = Field(examples=["9"])


@app.get("/books", summary="List books")
async def list_books() -> list[Book]:
    return [Book(isbn="9")]


@app.post("/books", summary="Add a book", status_code=201)
async def add_book(book: Book) -> Book:
    return book


@app.delete("/books/{isbn}", summary="Remove a book", status_code=204)
async def remove_book(isbn: str) -> None:
    """Forget it."""


'''
TEST = """

def test_books_are_listed_added_and_removed(client):
    assert client.get("/books").json() == [{"isbn": "9"}]
    assert client.post("/books", json={"isbn": "8"}).status_code == 201
    assert client.delete("/books/9").status_code == 204
"""


def quiet(output: str) -> bool:
    return not re.search(r"^(fatal|error|.*Traceback|make.*Error)", output, re.MULTILINE | re.IGNORECASE)


@pytest.fixture
def folder(tmp_path) -> Path:
    """The five files, and nothing else: neither a .dockerignore nor git."""
    return copy_five(tmp_path)


@pytest.mark.contract
def test_verbs_work_and_print_no_error(engine, folder):
    knobs = (f"ENGINE={engine}", f"IMAGE={NAME}-five", f"NAME={NAME}-five", f"PORT={free_port()}")
    listed = make(folder=folder)[1]
    assert {verb for verb in VERBS if f"make {verb} " not in listed} == set()
    assert "make check" not in listed  # what is not there is not listed
    try:
        for verb in VERBS:
            status, output = make(verb, *knobs, folder=folder)
            assert (status, quiet(output)) == (0, True), output
    finally:
        run("sh", "-c", f"{engine} rm --force {NAME}-five 2>/dev/null; {engine} image rm --force {NAME}-five")


@pytest.mark.contract
def test_new_service_is_a_copy_one_name_a_route_and_its_test(engine, folder):
    """As the README has it, typed."""
    name, port = f"{NAME}-books", free_port()
    makefile, main, tests = (folder / file for file in ("Makefile", "main.py", "test_main.py"))
    makefile.write_text(re.sub(r"^(NAME += ).*", rf"\g<1>{name}", makefile.read_text(), count=1, flags=re.MULTILINE))
    main.write_text(main.read_text().replace(CONTAINER, ROUTE.lstrip() + CONTAINER))
    tests.write_text(tests.read_text() + TEST)
    try:
        status, output = make("test", "run", f"ENGINE={engine}", f"PORT={port}", folder=folder)
        assert (status, quiet(output)) == (0, True), output
        assert httpx.get(f"http://127.0.0.1:{port}/books").json() == [{"isbn": "9"}]
        title = '{{index .Config.Labels "org.opencontainers.image.title"}}'
        assert run(engine, "inspect", "--format", title, name) == name
        status, output = make("lint", "stop", f"ENGINE={engine}", folder=folder)
        assert status == 0, output
    finally:
        run("sh", "-c", f"{engine} rm --force {name} 2>/dev/null; {engine} image rm --force {name}")
