"""What the house promises: imports run one way, and a user's own routes concern his own tests alone."""

import ast
import re
import shutil
import subprocess
import sys

import pytest

from tests.harness import HERE, with_service

ROOMS = {"main": ["main.py"], "test_main": ["test_main.py"], "tests": ["tests"], "bench": ["bench"]}

OTHERS = '''
from fastapi import status


class Settings(BaseModel):
    """None."""


settings: Settings


def prestart() -> None:
    """Nothing."""


app = FastAPI(title="Books", version="1.0.0")  # which the manifests have, too: `make deploy` takes that image


class Book(BaseModel):
    isbn: str = Field(examples=["9"])


@app.get("/books", summary="List books")
async def list_books() -> list[Book]:
    return [Book(isbn="9")]


@app.post("/books", summary="Add a book", status_code=status.HTTP_201_CREATED)
async def add_book(book: Book) -> Book:
    return book


@app.delete("/books/{isbn}", summary="Remove a book", status_code=status.HTTP_204_NO_CONTENT)
async def remove_book(isbn: str) -> None:
    pass
'''


def imported(room: str) -> set[str]:
    """The rooms whose modules this one's import."""
    sources = [path for part in ROOMS[room] for path in [HERE / part, *(HERE / part).rglob("*.py")] if path.is_file()]
    names = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source.read_text()))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names & ROOMS.keys() - {room}


def test_imports_run_one_way_as_the_page_says():
    rows = re.findall(r"^\| `(\w+)(?:\.py|/)` \| (.*?) \|", (HERE / "docs/house.md").read_text(), re.MULTILINE)
    table = {room: set(re.findall(r"`(\w+)(?:\.py|/)`", cell)) for room, cell in rows}
    assert table == {room: imported(room) for room in ROOMS}
    assert not any("bench" in others for others in table.values())
    assert not table["main"]


@pytest.mark.check
def test_other_routes_in_main_py_turn_nothing_red_but_test_main_py(tmp_path):
    shutil.copytree(HERE, tmp_path, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"), dirs_exist_ok=True)
    (tmp_path / ".venv").symlink_to(HERE / ".venv")
    (tmp_path / "main.py").write_text(with_service(OTHERS))
    pytest_ = (sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "--numprocesses=2")

    def failed(*arguments: str) -> list[str]:
        result = subprocess.run([*pytest_, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode in {0, 1}, result.stdout + result.stderr
        return re.findall(r"^(?:FAILED|ERROR) \S+?::(\w+)", result.stdout, re.MULTILINE)

    assert failed("-m", "not check and not contract", "tests", "bench") == []
    red = set(failed("test_main.py"))
    assert red
    # These hold for any service, as test_main.py says.
    assert not red & {
        "test_probes_succeed_without_a_body_too_and_are_never_cached",
        "test_unknown_path_is_not_found",
        "test_documentation_comes_whole_and_from_this_host_alone",
    }
