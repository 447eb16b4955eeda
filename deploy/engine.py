"""Pass on to the engine what Traefik asks of it: which replicas there are, and what becomes of them. Nothing else.

Who holds the engine's socket is root on its machine. Traefik, which the whole world talks to, gets this in its place.
"""

import asyncio
import re

SOCKET = "/var/run/docker.sock"
PORT = 2375
QUESTIONS = re.compile(
    rb"(GET|HEAD) (/v[0-9.]+)?"
    rb"/(_ping|version|info|events|networks|services|tasks|nodes/[0-9a-z]+|containers/(json|[0-9a-f]+/json))"
    rb"(\?[^ ]*)? HTTP/1\.1"
)
REFUSAL = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One question a connection: the line alone is passed on, so nothing can hide behind it."""
    try:
        line = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0]
        if not QUESTIONS.fullmatch(line):
            print(f"refused: {line!r}", flush=True)
            writer.write(REFUSAL)
            return
        answers, engine = await asyncio.open_unix_connection(SOCKET)
        try:
            engine.write(line + b"\r\nHost: engine\r\nConnection: close\r\n\r\n")
            while data := await answers.read(65536):
                writer.write(data)
                await writer.drain()
        finally:
            engine.close()
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        pass  # whoever asked has gone, or sends no question
    finally:
        writer.close()


async def main() -> None:
    async with await asyncio.start_server(answer, port=PORT) as server:
        await server.serve_forever()


asyncio.run(main())
