"""The service that the tests of the container's side run: it stands in main.py in the place of yours, and stays as it is."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field


class Settings(BaseModel):
    """The settings of the service, each a variable of its name in capitals."""

    hello: str = Field("World", description="whom `GET /` says hello to")


if TYPE_CHECKING:  # main.py defines these further down
    settings = Settings()

    def is_probe(scope: Any) -> bool: ...


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
    yield


def prestart() -> None:
    """Steps before starting."""


app = FastAPI(
    title="Items",
    version="1.0.0",
    lifespan=lifespan,
    telemetry={"exclude": lambda scope: is_probe(scope)},
)


class Greeting(BaseModel):
    Hello: str = Field(examples=["World"])


class Item(BaseModel):
    item_id: int = Field(examples=[5])
    q: str | None = Field(examples=["somequery"])


@app.head("/", include_in_schema=False)
@app.get("/", summary="Say hello")
async def read_root() -> Greeting:
    return Greeting(Hello=settings.hello)


@app.get("/items/{item_id}", summary="Read an item")
async def read_item(item_id: int, q: str | None = None) -> Item:
    return Item(item_id=item_id, q=q)


@app.get("/broken", include_in_schema=False)
async def fail() -> None:
    raise LookupError("the secret inside")


@app.get("/half", include_in_schema=False)
async def fail_amid_the_response() -> StreamingResponse:
    async def chunks() -> AsyncGenerator[bytes]:
        yield b"half"
        raise LookupError

    return StreamingResponse(chunks())


@app.post("/size", include_in_schema=False)
async def read_size(request: Request) -> int:
    return len(await request.body())
