"""One name for several servers, as a headless Service has it (its DNS tells the EndpointSlices' ready addresses).

A client follows who is behind the name while it goes on calling, and shares its calls evenly among them.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from cryptography import x509

from tests.services.authority import Authority
from tests.services.client.conftest import Room
from tests.services.client.test_client_renewal import server
from tests.services.rollout.names import Names
from trimtab_client import AsyncRewardClient, ChannelOptions, RewardClient, Tls, channel

HOSTS = [f"127.24.7.{number}" for number in (1, 2, 3)]
NAME = x509.DNSName("reward.trimtab.svc")
GIVE_UP_S = 30.0


async def until(shares: Callable[[], Awaitable[list[int]]], wanted: Callable[[list[int]], bool]) -> None:
    """Return once 12 calls in a row are shared as wanted."""
    give_up = time.monotonic() + GIVE_UP_S
    while not wanted(found := await shares()):
        assert time.monotonic() < give_up, found
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("style", ["sync", "asyncio"])
async def test_calls_follow_who_is_behind_a_name_and_are_shared_evenly(style, tmp_path, monkeypatch):
    monkeypatch.setattr(channel, "LOOKUP_S", 0.1)
    authority = Authority.make(tmp_path / "authority")
    cert, key = authority.issue("server", NAME)
    rooms = [Room() for _ in HOSTS]
    async with AsyncExitStack() as stack:
        names = stack.enter_context(Names("127.0.0.1", stale_s=0))
        port = 0
        for host, room in zip(HOSTS, rooms, strict=True):
            settings: dict[str, Any] = {"host": host, "port": port, "connection_age_s": 0.3}
            port = (await stack.enter_async_context(server(room, tls_cert=cert, tls_key=key, **settings))).port
        options = ChannelOptions(tls=Tls(authority.ca), retries=0, timeout_s=10)
        names.set(HOSTS[:1], at_once=True)
        if style == "sync":
            blocking = stack.enter_context(RewardClient(names.target(port), options))

            async def score() -> None:
                await asyncio.to_thread(blocking.score_texts, [("a", "b")])
        else:
            client = await stack.enter_async_context(AsyncRewardClient(names.target(port), options))

            async def score() -> None:
                await client.score_texts([("a", "b")])

        async def shares() -> list[int]:
            before = [len(room.calls["Score"]) for room in rooms]
            for _ in range(12):
                await score()
            return [len(room.calls["Score"]) - had for room, had in zip(rooms, before, strict=True)]

        assert await shares() == [12, 0, 0]
        names.set(HOSTS)  # two more
        await until(shares, lambda found: min(found) >= 3)
        names.set(HOSTS[1:])  # the first one leaves
        await until(shares, lambda found: found[0] == 0 and min(found[1:]) >= 4)
