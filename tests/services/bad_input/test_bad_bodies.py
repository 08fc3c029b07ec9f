"""A hundred thousand mutated HTTP bodies, over a few connections that stay open."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Self

import pytest

from tests.services.bad_input.conftest import Running
from tests.services.gateway.test_bad_input import refusals_of

CONNECTIONS = 16
PINNED_PATIENCE_S = 5.0
GROWTH_MB = 40


class Connections:
    """HTTP/1.1 with no more than the test needs: a full client would take most of the test's time."""

    def __init__(self, address: str, count: int) -> None:
        self._host, port = address.rsplit(":", 1)
        self._port, self._count = int(port), count
        self._free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        for _ in range(self._count):
            self._free.put_nowait(await asyncio.open_connection(self._host, self._port))
        return self

    async def __aexit__(self, *_: object) -> None:
        while not self._free.empty():
            self._free.get_nowait()[1].close()

    async def post(self, path: str, content: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        reader, writer = await self._free.get()
        head = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(content)}"]
        if b'"version"' in content:  # a pin that nothing satisfies is waited for until shortly before the deadline
            head.append(f"x-timeout-s: {PINNED_PATIENCE_S}")
        writer.write("\r\n".join([*head, "", ""]).encode() + content)
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        if "content-length" in headers:
            body = await reader.readexactly(int(headers["content-length"]))
        else:
            body = b"".join([chunk async for chunk in _chunks(reader)])
        self._free.put_nowait((reader, writer))
        return int(first.split()[1]), body


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int(await reader.readline(), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readline()


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_a_hundred_thousand_mutated_bodies_wear_nothing_out(running: Running) -> None:
    async with Connections(running.addresses["http"], CONNECTIONS) as connections:
        await refusals_of(connections.post, 5_000, seed=2)
        before_mb = running.memory_mb()
        await refusals_of(connections.post, 100_000, seed=3)
        assert (await connections.post("/get_reward", b'{"query": ["w1"]}'))[0] == 200
    assert running.process.poll() is None
    grown_mb = running.memory_mb() - before_mb
    assert grown_mb < GROWTH_MB, f"{before_mb:.0f} MB grew by {grown_mb:.0f} MB"
