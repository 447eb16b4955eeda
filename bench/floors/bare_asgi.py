import asyncio


async def app(scope, receive, send):
    if scope["type"] == "http":
        if scope["path"] == "/wait":
            await asyncio.sleep(0.05)
        body = b'{"Hello":"World"}' if scope["path"] == "/" else b'{"item_id":5,"q":"somequery"}'
        headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
