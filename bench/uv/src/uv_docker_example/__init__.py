from fastapi import FastAPI
from pydantic import BaseModel, Field

app = FastAPI(title="Items", version="1.0.0")


class Greeting(BaseModel):
    Hello: str = Field(examples=["World"])


class Item(BaseModel):
    item_id: int = Field(examples=[5])
    q: str | None = Field(examples=["somequery"])


@app.head("/", include_in_schema=False)
@app.get("/", summary="Say hello")
async def read_root() -> Greeting:
    return Greeting(Hello="World")


@app.get("/items/{item_id}", summary="Read an item")
async def read_item(item_id: int, q: str | None = None) -> Item:
    return Item(item_id=item_id, q=q)
