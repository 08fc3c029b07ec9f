"""Callers who are not known cannot take what known callers need: neither memory nor room."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import islice

from tests.services.gateway.conftest import gateway
from trimtab.gateway.guard import LINGERING_AT_ONCE, OPEN_AT_ONCE, OPEN_BODY_BYTES
from trimtab.runtime.auth_config import AuthConfig
from trimtab.runtime.keys import add_key

HEAD = "POST {route} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n{{"


@asynccontextmanager
async def never_ending(url: str, route: str, count: int) -> AsyncIterator[list[asyncio.StreamReader]]:
    """So many connections without credentials, on each of which a request's body has begun."""
    host, port = url.removeprefix("http://").split(":")
    opened = [await asyncio.open_connection(host, int(port)) for _ in range(count)]
    for _, writer in opened:
        writer.write(HEAD.format(route=route).encode())
        await writer.drain()
    try:
        yield [reader for reader, _ in opened]
    finally:
        for _, writer in opened:
            writer.close()


async def test_what_is_open_to_all_takes_small_bodies():
    async with gateway(reward="127.0.0.1:1") as edge:
        for route in ("/healthz", "/dashboard/session", "/dashboard/sign-in", "/dashboard/static/live.js"):
            refused = await edge.http.post(route, content=b" " * (OPEN_BODY_BYTES + 1))
            assert (refused.status_code, refused.json()["error"]["field"]) == (413, "body"), route
        longest = await edge.http.post("/dashboard/session", json={"token": "t" * 16_384})
        assert longest.status_code == 200


async def test_strangers_take_no_room_of_known_callers(tmp_path):
    _, token = add_key(tmp_path / "keys.yaml", "ann", ["score"])
    known = {"authorization": f"Bearer {token}"}
    auth, few = AuthConfig(keys_file=tmp_path / "keys.yaml"), {"max_concurrent_calls": 2}
    async with gateway(reward="127.0.0.1:1", timeout_s=2, auth=auth, limits=few) as edge:
        assert (await edge.http.get("/v1/models", headers=known)).status_code == 200
        async with never_ending(edge.url, "/v1/score", LINGERING_AT_ONCE + 8) as refused:
            assert (await edge.http.get("/v1/models", headers=known)).status_code == 200
            for reader in refused:
                assert (await asyncio.wait_for(reader.readline(), 10)).split()[1] == b"401"
        async with never_ending(edge.url, "/dashboard/session", OPEN_AT_ONCE + 8) as strangers:
            first = [asyncio.create_task(reader.readline()) for reader in strangers]
            answered = [await line for line in islice(asyncio.as_completed(first, timeout=20), 8)]
            assert [line.split()[1] for line in answered] == [b"429"] * 8
            assert sum(task.done() for task in first) == 8
            assert (await edge.http.get("/dashboard/sign-in")).status_code == 429
            assert (await edge.http.get("/v1/models", headers=known)).status_code == 200
            for task in first:
                task.cancel()
