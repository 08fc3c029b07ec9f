"""The generator's replicas, and that they serve the newest version: also one that died and came back with its first.

A replica that starts anew knows nothing of the run. While completions are asked for, each is looked at once a second
and told to load what it lacks; calls that are pinned to the version wait there until it has it. One that cannot load it
(its disk is full, the store is away from there) would let them wait in vain: as long as another has it, calls go there.
Behind a name of DNS (dns:///generator:7101) replicas come and go, so it is looked up each time.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from trimtab.runtime.logs import get_logger
from trimtab_client import AsyncGeneratorClient, ChannelOptions, ModelVersion, TrimtabError, Unavailable
from trimtab_client.channel import parse_addresses

log = get_logger(__name__)

LOOK_EVERY_S = 1.0
LOOK_TIMEOUT_S = 5.0
BY_DNS = "dns:///"


class GeneratorPool:
    """One client for all replicas, which shares prompts out, and one a replica to load versions.

    Attributes:
        client: for calls that begin now; made anew when the replicas that can take them change.
        newest: the version that all shall serve.
    """

    def __init__(
        self, addresses: str, options: ChannelOptions, timeout_s: float, say: Callable[[str, str], None]
    ) -> None:
        """`say` is told (replica, why it cannot serve `newest`), and "" once it does."""
        self.client = AsyncGeneratorClient(addresses, options)
        self._addresses = parse_addresses(addresses)
        self._taking = set(self._addresses)  # what `client` calls
        self._options = options
        self._timeout_s = timeout_s
        self._say = say
        self._found: dict[str, ChannelOptions] = {}
        self._replicas: dict[str, AsyncGeneratorClient] = {}
        self._refusals: dict[str, str] = {}
        self._former: list[tuple[float, AsyncGeneratorClient]] = []  # with the time by which their calls have ended
        self.newest: ModelVersion | None = None

    async def load(self) -> None:
        """Have the replicas serve `newest`; returns once they do, those that are away or refuse it left aside.

        Raises the first replica's TrimtabError where none can.
        """
        await self._look_up()
        replicas = dict(self._replicas)
        outcomes = await asyncio.gather(*map(self._load, replicas.values()), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(failures) == len(replicas) or any(not isinstance(each, TrimtabError) for each in failures):
            raise failures[0]
        for address, outcome in zip(replicas, outcomes, strict=True):
            self._note(address, outcome)

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
                        looks[address] = asyncio.create_task(self._look_at(address, replica))
        finally:
            for look in looks.values():
                look.cancel()
            await asyncio.gather(*looks.values(), return_exceptions=True)

    async def _look_at(self, address: str, replica: AsyncGeneratorClient) -> None:
        try:
            served = (await replica.get_model(timeout_s=LOOK_TIMEOUT_S)).version
        except TrimtabError:
            return  # away: the calls for completions say so
        newest, failure = self.newest, None
        if newest is not None and served.digest != newest.digest:
            try:
                await self._load(replica)
            except TrimtabError as error:
                failure = error
        if newest == self.newest:
            self._note(address, failure)

    def _note(self, address: str, failure: BaseException | None) -> None:
        """Remember and tell whether a replica could load `newest`."""
        reason = f"the generator at {address} cannot serve {self.newest}: {failure}" if failure else ""
        if address not in self._replicas or reason == self._refusals.get(address, ""):
            return
        if reason:
            self._refusals[address] = reason
            log.warning("a replica cannot serve the version", replica=address, reason=reason)
        else:
            del self._refusals[address]
        self._say(f"replica {address}", reason)
        self._route()

    def _route(self) -> None:
        """Let calls that begin now go to the replicas that can serve `newest`, to all where none can."""
        taking = [address for address in self._replicas if address not in self._refusals] or list(self._replicas)
        if set(taking) == self._taking:
            return
        self._taking = set(taking)
        self._former.append((asyncio.get_running_loop().time() + self._timeout_s, self.client))
        self.client = AsyncGeneratorClient(taking, self._found[taking[0]])

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
        self._found = found
        gone = [self._forget(address) for address in self._replicas.keys() - found.keys()]
        for address in found.keys() - self._replicas.keys():
            self._replicas[address] = AsyncGeneratorClient(address, found[address])
        self._route()
        await asyncio.gather(*(each.close() for each in gone))

    def _forget(self, address: str) -> AsyncGeneratorClient:
        """A replica is gone; its client, to be closed."""
        if self._refusals.pop(address, ""):
            self._say(f"replica {address}", "")
        return self._replicas.pop(address)


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
