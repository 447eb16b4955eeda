# ty: ignore[import-not-found]
"""What is tried of each package that services often use, in a strict container: imported, and used a little.

Each function is called without a network, with a root that is read-only and a bounded /tmp; its first line says what it
does, for the table in docs/packages.md.
"""

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

TRIED: dict[str, Callable[[], object]] = {}


def tries(requirement: str) -> Callable:
    """Name the requirement that a function needs."""

    def add(function: Callable) -> Callable:
        TRIED[requirement] = function
        return function

    return add


@contextlib.contextmanager
def refused() -> Generator[None]:
    """Nothing listens on this host: a client that gets as far as that works."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - each has its own
        told = f"{error!r} {error.__cause__!r} {error.__context__!r}"
        assert any(word in told.lower() for word in ("refused", "connect", "111", "unavailable")), told
    else:
        raise AssertionError("something listens on port 1")


# --- Databases ---


@tries("sqlalchemy[asyncio]")
def _() -> None:
    """a query to SQLite"""
    import sqlalchemy

    with sqlalchemy.create_engine("sqlite:////tmp/sqlalchemy.db").connect() as connection:
        assert connection.execute(sqlalchemy.text("select 6 * 7")).scalar() == 42


@tries("aiosqlite")
def _() -> None:
    """a query to SQLite, through SQLAlchemy too"""
    import aiosqlite
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import create_async_engine

    async def query() -> None:
        async with aiosqlite.connect("/tmp/aiosqlite.db") as database, database.execute("select 42") as rows:
            assert await rows.fetchone() == (42,)
        engine = create_async_engine("sqlite+aiosqlite:////tmp/aiosqlite.db")
        async with engine.connect() as connection:
            assert (await connection.execute(text("select 42"))).scalar() == 42
        await engine.dispose()

    asyncio.run(query())


@tries("sqlmodel")
def _() -> None:
    """a row written to SQLite and read"""
    from sqlmodel import Field, Session, SQLModel, create_engine, select

    class Book(SQLModel, table=True):
        id: int | None = Field(default=None, primary_key=True)
        title: str

    SQLModel.metadata.create_all(engine := create_engine("sqlite:////tmp/sqlmodel.db"))
    with Session(engine) as session:
        session.add(Book(title="9"))
        session.commit()
        assert session.exec(select(Book)).one().title == "9"


@tries("alembic")
def _() -> None:
    """a migration of SQLite"""
    import sqlalchemy
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    with sqlalchemy.create_engine("sqlite://").connect() as connection:
        Operations(MigrationContext.configure(connection)).create_table(
            "book", sqlalchemy.Column("id", sqlalchemy.Integer)
        )


@tries("asyncpg")
def _() -> None:
    """a connection that is refused"""
    import asyncpg

    with refused():
        asyncio.run(asyncpg.connect("postgresql://u:p@127.0.0.1:1/d", timeout=5))


@tries("psycopg[binary]")
def _() -> None:
    """libpq that it brings; a connection that is refused"""
    import psycopg

    assert psycopg.pq.__impl__ == "binary"
    with refused():
        psycopg.connect("postgresql://u:p@127.0.0.1:1/d")


@tries("pymysql")
def _() -> None:
    """a connection that is refused"""
    import pymysql

    with refused():
        pymysql.connect(host="127.0.0.1", port=1)


@tries("pymongo")
def _() -> None:
    """BSON there and back; a connection that is refused"""
    import bson
    import pymongo

    assert bson.decode(bson.encode({"a": 1})) == {"a": 1}
    with refused():
        pymongo.MongoClient("127.0.0.1", 1, serverSelectionTimeoutMS=200).admin.command("ping")


@tries("redis")
def _() -> None:
    """a connection that is refused"""
    import redis

    with refused():
        redis.Redis(port=1).ping()


@tries("duckdb")
def _() -> None:
    """a query to a file"""
    import duckdb

    assert duckdb.connect("/tmp/duck.db").execute("select 6 * 7").fetchone() == (42,)


# --- Crypto ---


@tries("cryptography")
def _() -> None:
    """a certificate of its own, and a TLS handshake with it"""
    import datetime
    import ssl

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    certificate = builder.sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    plain = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    Path("/tmp/own.pem").write_bytes(plain + certificate.public_bytes(pem))
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain("/tmp/own.pem")
    client.check_hostname = False
    client.load_verify_locations("/tmp/own.pem")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [server.wrap_bio(to_server, to_client, server_side=True), client.wrap_bio(to_client, to_server)]
    for _ in range(4):
        for side in sides:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    assert sides[1].version() == "TLSv1.3"


@tries("bcrypt")
def _() -> None:
    """a password hashed and checked"""
    import bcrypt

    assert bcrypt.checkpw(b"secret", bcrypt.hashpw(b"secret", bcrypt.gensalt(4)))


@tries("argon2-cffi")
def _() -> None:
    """a password hashed and checked"""
    import argon2

    hasher = argon2.PasswordHasher(time_cost=1, memory_cost=1024)
    assert hasher.verify(hasher.hash("secret"), "secret")


@tries("pyjwt[crypto]")
def _() -> None:
    """a token signed and read"""
    import jwt

    key = "k" * 32
    assert jwt.decode(jwt.encode({"sub": "me"}, key), key, ["HS256"]) == {"sub": "me"}


@tries("pynacl")
def _() -> None:
    """a box closed and opened"""
    import nacl.secret

    box = nacl.secret.SecretBox(bytes(32))
    assert box.decrypt(box.encrypt(b"x")) == b"x"


# --- Science and pictures ---


@tries("numpy")
def _() -> None:
    """a determinant"""
    import numpy

    assert round(numpy.linalg.det(numpy.array([[1.0, 2.0], [3.0, 4.0]]))) == -2


@tries("scipy")
def _() -> None:
    """a minimum found, an equation solved"""
    import scipy.linalg
    import scipy.optimize

    assert round(scipy.optimize.minimize_scalar(lambda x: (x - 3) ** 2).x) == 3
    assert list(scipy.linalg.solve([[2, 0], [0, 4]], [2, 4])) == [1, 1]


@tries("pandas")
def _() -> None:
    """a table by way of CSV"""
    import pandas

    table = pandas.DataFrame({"a": [1, 2]})
    assert pandas.read_csv(io.StringIO(table.to_csv())).a.sum() == 3


@tries("polars")
def _() -> None:
    """a table by way of Parquet"""
    import polars

    polars.DataFrame({"a": [1, 2]}).write_parquet("/tmp/polars.parquet")
    assert polars.read_parquet("/tmp/polars.parquet")["a"].sum() == 3


@tries("pyarrow")
def _() -> None:
    """a table by way of Parquet"""
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2]}), "/tmp/arrow.parquet")
    assert pyarrow.parquet.read_table("/tmp/arrow.parquet").num_rows == 2


@tries("scikit-learn")
def _() -> None:
    """a model fitted"""
    from sklearn.linear_model import LinearRegression

    assert round(LinearRegression().fit([[0], [1]], [0, 2]).coef_[0]) == 2


@tries("scikit-image")
def _() -> None:
    """a picture filtered"""
    import numpy
    import skimage

    assert skimage.filters.gaussian(numpy.ones((4, 4))).shape == (4, 4)


@tries("matplotlib")
def _() -> None:
    """a PNG drawn, without a place of its own"""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.plot([1, 2])
    plt.savefig("/tmp/plot.png")
    assert Path("/tmp/plot.png").read_bytes().startswith(b"\x89PNG")


@tries("pillow")
def _() -> None:
    """a PNG and a JPEG written"""
    from PIL import Image

    for kind in ("png", "jpeg"):
        Image.new("RGB", (9, 9)).save(f"/tmp/pillow.{kind}")


@tries("opencv-python-headless")
def _() -> None:
    """a PNG written and read"""
    import cv2
    import numpy

    assert cv2.imwrite("/tmp/cv.png", numpy.zeros((9, 9, 3), numpy.uint8))
    assert cv2.imread("/tmp/cv.png").shape == (9, 9, 3)


@tries("shapely")
def _() -> None:
    """an area"""
    import shapely

    assert shapely.box(0, 0, 2, 3).area == 6


# --- Formats ---


@tries("orjson")
def _() -> None:
    """JSON there and back"""
    import orjson

    assert orjson.loads(orjson.dumps({"a": 1})) == {"a": 1}


@tries("msgpack")
def _() -> None:
    """an object there and back"""
    import msgpack

    assert msgpack.unpackb(msgpack.packb({"a": 1})) == {"a": 1}


@tries("lxml")
def _() -> None:
    """XPath and XSLT"""
    from lxml import etree

    assert etree.fromstring("<a><b>9</b></a>").xpath("string(b)") == "9"


@tries("pyyaml")
def _() -> None:
    """a document, by the parser in C"""
    import yaml

    assert yaml.load("a: [1]", yaml.CSafeLoader) == {"a": [1]}


@tries("protobuf")
def _() -> None:
    """a message there and back"""
    from google.protobuf import struct_pb2

    message = struct_pb2.Value(number_value=42)
    assert struct_pb2.Value.FromString(message.SerializeToString()) == message


@tries("openpyxl")
def _() -> None:
    """a workbook written"""
    import openpyxl

    openpyxl.Workbook().save("/tmp/book.xlsx")


@tries("reportlab")
def _() -> None:
    """a PDF written"""
    from reportlab.pdfgen.canvas import Canvas

    canvas = Canvas("/tmp/page.pdf")
    canvas.drawString(9, 9, "hello")
    canvas.save()


@tries("zstandard")
def _() -> None:
    """bytes there and back"""
    import zstandard

    assert zstandard.decompress(zstandard.compress(b"x")) == b"x"


@tries("tiktoken")
def _() -> None:
    """an encoding of one's own"""
    import tiktoken

    ranks = {bytes([byte]): byte for byte in range(256)}
    assert tiktoken.Encoding("own", pat_str=".", mergeable_ranks=ranks, special_tokens={}).encode("hi") == [104, 105]


# --- Queues and clouds ---


@tries("celery")
def _() -> None:
    """a task, run at once"""
    import celery

    app = celery.Celery(broker="memory://", backend="cache+memory://")
    app.conf.task_always_eager = True

    @app.task
    def answer() -> int:
        return 42

    assert answer.delay().get() == 42


@tries("pika")
def _() -> None:
    """a connection that is refused"""
    import pika

    with refused():
        pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", 1))


@tries("aiokafka")
def _() -> None:
    """a connection that is refused"""
    import aiokafka

    async def start() -> None:
        producer = aiokafka.AIOKafkaProducer(bootstrap_servers="127.0.0.1:1")
        try:
            await producer.start()
        finally:
            await producer.stop()

    with refused():
        asyncio.run(start())


@tries("grpcio")
def _() -> None:
    """a call to a server of its own"""
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    server = grpc.server(ThreadPoolExecutor())
    handlers = {"hello": grpc.unary_unary_rpc_method_handler(lambda request, _: request)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("own", handlers)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert channel.unary_unary("/own/hello")(b"x", timeout=20) == b"x"
    server.stop(None).wait()


@tries("boto3")
def _() -> None:
    """an address signed for S3"""
    import boto3

    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "eu-west-1"}
    url = boto3.client("s3", **keys).generate_presigned_url("get_object", Params={"Bucket": "b", "Key": "k"})
    assert "amazonaws.com" in url


@tries("google-cloud-storage")
def _() -> None:
    """a client, and an object's address"""
    from google.cloud import storage

    assert storage.Client.create_anonymous_client().bucket("b").blob("k").public_url.endswith("/b/k")


@tries("azure-storage-blob")
def _() -> None:
    """a client, and an object's address"""
    from azure.storage.blob import BlobClient

    assert BlobClient("https://a.example", "b", "k").url == "https://a.example/b/k"


# --- Web ---


@tries("jinja2")
def _() -> None:
    """a template, as Starlette renders it"""
    from starlette.requests import Request
    from starlette.templating import Jinja2Templates

    Path("/tmp/page.html").write_text("{% for i in range(3) %}{{ i }}{% endfor %}")
    request = Request({"type": "http", "headers": []})
    assert Jinja2Templates("/tmp").TemplateResponse(request, "page.html").body == b"012"


@tries("httpx[http2]")
def _() -> None:
    """a client for HTTP/2"""
    import httpx

    with refused(), httpx.Client(http2=True) as client:
        client.get("http://127.0.0.1:1")


@tries("aiohttp")
def _() -> None:
    """a connection that is refused"""
    import aiohttp

    async def get() -> None:
        async with aiohttp.ClientSession() as session, session.get("http://127.0.0.1:1"):
            pass

    with refused():
        asyncio.run(get())


@tries("websockets")
def _() -> None:
    """a message to a server of its own and back"""
    import websockets

    async def talk() -> None:
        async def echo(socket: Any) -> None:
            await socket.send(await socket.recv())

        async with websockets.serve(echo, "127.0.0.1", 0) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            async with websockets.connect(f"ws://127.0.0.1:{port}") as client:
                await client.send("x")
                assert await client.recv() == "x"

    asyncio.run(talk())


@tries("python-multipart")
def _() -> None:
    """an upload of 3 MB, which FastAPI keeps in /tmp"""
    from fastapi import FastAPI, UploadFile
    from fastapi.testclient import TestClient

    app = FastAPI()

    @app.post("/")
    async def upload(file: UploadFile) -> int:
        return len(await file.read())

    assert TestClient(app).post("/", files={"file": bytes(3_000_000)}).json() == 3_000_000


@tries("email-validator")
def _() -> None:
    """an address, by pydantic"""
    from pydantic import EmailStr, TypeAdapter

    assert TypeAdapter(EmailStr).validate_python("me@example.com")


@tries("pydantic-settings")
def _() -> None:
    """a setting from the environment"""
    from pydantic_settings import BaseSettings

    os.environ["COLOUR"] = "red"
    assert type("Own", (BaseSettings,), {"__annotations__": {"colour": str}})().colour == "red"


@tries("watchfiles")
def _() -> None:
    """a change seen"""
    import watchfiles

    with tempfile.TemporaryDirectory() as folder:
        assert not next(watchfiles.watch(folder, rust_timeout=100, yield_on_timeout=True))


# --- Operation ---


@tries("sentry-sdk")
def _() -> None:
    """an exception on its way"""
    import sentry_sdk

    sent: list = []
    sentry_sdk.init("https://a@127.0.0.1/1", before_send=lambda event, _: sent.append(event))
    sentry_sdk.capture_exception(ValueError("x"))
    assert sent


@tries("prometheus-client")
def _() -> None:
    """a counter shown"""
    import prometheus_client

    prometheus_client.Counter("own", "of its own").inc()
    assert b"own_total 1.0" in prometheus_client.generate_latest()


@tries("structlog")
def _() -> None:
    """a line"""
    import structlog

    with contextlib.redirect_stdout(io.StringIO()) as out:
        structlog.wrap_logger(structlog.PrintLogger(sys.stdout)).info("hello")
    assert "hello" in out.getvalue()


@tries("loguru")
def _() -> None:
    """a line"""
    import loguru

    out = io.StringIO()
    loguru.logger.add(out)
    loguru.logger.info("hello")
    assert "hello" in out.getvalue()


@tries("psutil")
def _() -> None:
    """the memory of its own process"""
    import psutil

    assert psutil.Process().memory_info().rss > 1_000_000


@tries("tzdata")
def _() -> None:
    """a time zone, though the image has its own"""
    import zoneinfo

    assert zoneinfo.ZoneInfo("Europe/Berlin")


@tries("gevent")
def _() -> None:
    """two greenlets"""
    import gevent

    assert [job.get() for job in gevent.joinall([gevent.spawn(lambda: 1), gevent.spawn(lambda: 2)])] == [1, 2]


def size(file: Any) -> int:
    """The bytes of a package's file, and of what it was compiled to."""
    paths = [Path(file.locate())]
    if paths[0].suffix == ".py":
        paths.append(Path(importlib.util.cache_from_source(str(paths[0]))))
    return sum(path.stat().st_size for path in paths if path.is_file())


if __name__ == "__main__":
    failed = {}
    for wanted in sys.argv[1:]:
        try:
            TRIED[wanted]()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the next one is tried
            failed[wanted] = repr(error)
    installed = {
        distribution.name: {"requires": distribution.requires or [], "bytes": sum(map(size, distribution.files or []))}
        for distribution in importlib.metadata.distributions()
    }
    print("\n" + json.dumps({"failed": failed, "installed": installed}))
