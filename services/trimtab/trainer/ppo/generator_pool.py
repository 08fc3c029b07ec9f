"""The generator's replicas, and that they serve the newest version: also one that died and came back with its first.

A replica that starts anew knows nothing of the run. While completions are asked for, each is looked at once a second
and told to load what it lacks; calls that are pinned to the version wait there until it has it. Behind a name of DNS
(dns:///generator:7101) replicas come and go, so it is looked up each time.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from trimtab_client import AsyncGeneratorClient, ChannelOptions, ModelVersion, TrimtabError, Unavailable
from trimtab_client.channel import parse_addresses

LOOK_EVERY_S = 1.0
LOOK_TIMEOUT_S = 5.0
BY_DNS = "dns:///"


class GeneratorPool:
    """One client for all replicas, which shares prompts out, and one a replica to load versions.

    Attributes:
        client: for calls that begin now; made anew when a name's replicas change.
        newest: the version that all shall serve.
    """

    def __init__(self, addresses: str, options: ChannelOptions, timeout_s: float) -> None:
        self.client = AsyncGeneratorClient(addresses, options)
        self._addresses = parse_addresses(addresses)
        self._options = options
        self._timeout_s = timeout_s
        self._replicas: dict[str, AsyncGeneratorClient] = {}
        self._former: list[tuple[float, AsyncGeneratorClient]] = []  # with the time by which their calls have ended
        self.newest: ModelVersion | None = None

    async def load(self) -> None:
        """Have the replicas serve `newest`; returns once they do, those that are away left aside.

        Raises the first replica's TrimtabError where none can.
        """
        await self._look_up()
        replicas = list(self._replicas.values())
        outcomes = await asyncio.gather(*map(self._load, replicas), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(failures) == len(replicas) or any(not isinstance(each, TrimtabError) for each in failures):
            raise failures[0]

    @asynccontextmanager
    async def kept_loaded(self) -> AsyncIterator[None]:
        """Within the block, replicas that come, or come back, are told to load `newest`."""
        task = asyncio.create_task(self._keep())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        """Close the channels."""
        former = [client for _, client in self._former]
        await asyncio.gather(*(each.close() for each in (self.client, *self._replicas.values(), *former)))

    async def _load(self, replica: AsyncGeneratorClient) -> None:
        if self.newest is not None:
            await replica.load_version(self.newest, timeout_s=self._timeout_s)

    async def _keep(self) -> None:
        looks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                await asyncio.sleep(LOOK_EVERY_S)
                with suppress(Unavailable):  # nobody behind the name: the calls for completions say so
                    await self._look_up()
                for address, replica in self._replicas.items():
                    if address not in looks or looks[address].done():
                        looks[address] = asyncio.create_task(self._look_at(replica))
        finally:
            for look in looks.values():
                look.cancel()
            await asyncio.gather(*looks.values(), return_exceptions=True)

    async def _look_at(self, replica: AsyncGeneratorClient) -> None:
        with suppress(TrimtabError):  # away: the calls for completions say so
            served = (await replica.get_model(timeout_s=LOOK_TIMEOUT_S)).version
            if self.newest is not None and served.digest != self.newest.digest:
                await self._load(replica)

    async def _look_up(self) -> None:
        """See which replicas there are now. Unavailable where a name has no address."""
        found: dict[str, ChannelOptions] = {}
        for address in self._addresses:
            found |= await _replicas(address, self._options)
        now = asyncio.get_running_loop().time()
        while self._former and self._former[0][0] < now:
            await self._former.pop(0)[1].close()
        if found.keys() == self._replicas.keys():
            return
        for gone in self._replicas.keys() - found.keys():
            await self._replicas.pop(gone).close()
        for address in found.keys() - self._replicas.keys():
            self._replicas[address] = AsyncGeneratorClient(address, found[address])
        if found.keys() != set(self._addresses):
            self._former.append((now + self._timeout_s, self.client))
            self.client = AsyncGeneratorClient(list(found), next(iter(found.values())))


async def _replicas(address: str, options: ChannelOptions) -> dict[str, ChannelOptions]:
    """Every address behind a name of DNS, each with the name for its certificate; any other address as it is."""
    if not address.startswith(BY_DNS):
        return {address: options}
    host, _, port = address.removeprefix(BY_DNS).rpartition(":")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unavailable("UNAVAILABLE", f"{host} has no address: {error}") from error
    if options.tls is not None and options.tls.server_name is None:
        options = replace(options, tls=replace(options.tls, server_name=host))
    numbers = {str(place[0]) for _, _, _, _, place in found}
    return {f"[{number}]:{port}" if ":" in number else f"{number}:{port}": options for number in sorted(numbers)}
