"""The generator's replicas, and that they serve the newest version: also one that died and came back with its first.

A replica that starts anew knows nothing of the run. While completions are asked for, each is looked at once a second
and told to load what it lacks; calls that are pinned to the version wait there until it has it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from trimtab_client import AsyncGeneratorClient, ChannelOptions, ModelVersion, TrimtabError
from trimtab_client.channel import parse_addresses

LOOK_EVERY_S = 1.0
LOOK_TIMEOUT_S = 5.0


class GeneratorPool:
    """One client for all addresses (`client`, which shares prompts out), one an address to load versions.

    Attributes:
        newest: the version that all shall serve.
    """

    def __init__(self, addresses: str, options: ChannelOptions, timeout_s: float) -> None:
        self.client = AsyncGeneratorClient(addresses, options)
        self._timeout_s = timeout_s
        self._replicas = [AsyncGeneratorClient(address, options) for address in parse_addresses(addresses)]
        self.newest: ModelVersion | None = None

    async def load(self) -> None:
        """Have the replicas serve `newest`; returns once they do, those that are away left aside.

        Raises the first replica's TrimtabError where none can.
        """
        outcomes = await asyncio.gather(*map(self._load, self._replicas), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if len(failures) == len(self._replicas) or any(not isinstance(each, TrimtabError) for each in failures):
            raise failures[0]

    @asynccontextmanager
    async def kept_loaded(self) -> AsyncIterator[None]:
        """Within the block, replicas that come back are told to load `newest`."""
        tasks = [asyncio.create_task(self._keep(replica)) for replica in self._replicas]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """Close the channels."""
        await asyncio.gather(self.client.close(), *(replica.close() for replica in self._replicas))

    async def _load(self, replica: AsyncGeneratorClient) -> None:
        if self.newest is not None:
            await replica.load_version(self.newest, timeout_s=self._timeout_s)

    async def _keep(self, replica: AsyncGeneratorClient) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            with suppress(TrimtabError):  # away: the calls for completions say so
                served = (await replica.get_model(timeout_s=LOOK_TIMEOUT_S)).version
                if self.newest is not None and served.digest != self.newest.digest:
                    await self._load(replica)
