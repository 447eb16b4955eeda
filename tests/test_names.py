"""Which names a user may give in the first part of main.py, and which the container's side needs."""

import httpx
import pytest

from tests.harness import Process

NAMES = """
import datetime
from asyncio import TimeoutError  # which is Python's own
from sys import exit
from typing import Annotated, Callable
from fastapi import APIRouter, Path
from starlette.exceptions import HTTPException

logger = logging.getLogger("shop")
options = Scope = 7

class Token(BaseModel):
    access_token: str

class Message(Token):
    pass

def quote(number: Annotated[int, Path()], call: Callable[[int], int] = abs) -> int:
    return call(number)

@app.get("/names")
async def names() -> list[str]:
    return [logger.name, str(options), Message(access_token="a").access_token, f"{datetime.timedelta(1)}", str(quote(-1))]
"""


def test_names_of_a_service_stay_what_it_has_made_them(variant):
    with Process(source=variant("import logging" + NAMES)) as process:
        assert httpx.get(process.url + "/names").json() == ["shop", "7", "a", "1 day, 0:00:00", "1"]


@pytest.mark.parametrize("names", ["Lifecycle, json_lines, main", "list, dict, str, type, isinstance", "signal, sys"])
def test_names_that_the_containers_side_has_taken_are_told_and_end_the_start(variant, names):
    process = Process(source=variant(f"{names.replace(',', ' =')} = lambda *_: 0"))
    assert process.end() == 1
    (line,) = process.lines
    assert line["message"].endswith(f" that the container's side needs; call them differently: {names}")
