"""Sending calls: deadlines, retries, several addresses. One transport a style; what a call means is in `requests`."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from trimtab_client.channel import Addresses, ChannelOptions, metadata, open_async, open_sync, parse_addresses
from trimtab_client.errors import TrimtabError, from_rpc_error
from trimtab_client.retries import delay_for, delays, may_repeat

T = TypeVar("T")
CALLS_AT_ONCE_PER_ADDRESS = 2


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request and how its answer (or each message of a stream) is read.

    `stub` is the generated stub class, `method` its method; `repeatable` says whether a repeat is harmless.
    """

    stub: Any
    method: str
    request: Any
    parse: Callable[[Any], T]
    repeatable: bool = True


class SyncTransport:
    """Blocking calls over one channel an address; thread-safe."""

    def __init__(self, addresses: Addresses, options: ChannelOptions) -> None:
        self.addresses = parse_addresses(addresses)
        self.options = options
        self._metadata = metadata(options, self.addresses)
        self._channels = [open_sync(address, options) for address in self.addresses]
        self._turn = itertools.count()
        self._lock = threading.Lock()

    def unary(self, call: Call[T], timeout_s: float | None = None) -> T:
        """Send one call; a repeatable one is tried again, at the next address, until its deadline."""
        until = time.monotonic() + (self.options.timeout_s if timeout_s is None else timeout_s)
        planned = delays(self.options.retries if call.repeatable else 0)
        while True:
            try:
                send = getattr(call.stub(self._next()), call.method)
                answer = send(call.request, timeout=max(until - time.monotonic(), 0.001), metadata=self._metadata)
                return call.parse(answer)
            except grpc.RpcError as failure:
                error = from_rpc_error(failure)
                wait_s = _wait(error, planned, until)
                if wait_s is None:
                    raise error from None
                time.sleep(wait_s)

    def many(self, calls: Sequence[Call[T]], timeout_s: float | None = None) -> list[T]:
        """Send several calls, spread over the addresses; answers in the calls' order."""
        if len(calls) == 1:
            return [self.unary(calls[0], timeout_s)]
        with ThreadPoolExecutor(CALLS_AT_ONCE_PER_ADDRESS * len(self._channels)) as pool:
            return list(pool.map(lambda call: self.unary(call, timeout_s), calls))

    def stream(self, call: Call[T], timeout_s: float | None = None) -> Iterator[T]:
        """The messages of a server stream; repeated only before the first message came."""
        until = time.monotonic() + (self.options.timeout_s if timeout_s is None else timeout_s)
        planned = delays(self.options.retries if call.repeatable else 0)
        while True:
            started = False
            open_stream = getattr(call.stub(self._next()), call.method)
            stream = open_stream(call.request, timeout=max(until - time.monotonic(), 0.001), metadata=self._metadata)
            try:
                for message in stream:
                    started = True
                    yield call.parse(message)
                return
            except grpc.RpcError as failure:
                error = from_rpc_error(failure)
                wait_s = None if started else _wait(error, planned, until)
                if wait_s is None:
                    raise error from None
                time.sleep(wait_s)
            finally:
                stream.cancel()

    def close(self) -> None:
        """Close all channels."""
        for channel in self._channels:
            channel.close()

    def _next(self) -> grpc.Channel:
        with self._lock:
            return self._channels[next(self._turn) % len(self._channels)]


class AsyncTransport:
    """asyncio calls over one channel an address; used on the event loop it first calls on."""

    def __init__(self, addresses: Addresses, options: ChannelOptions) -> None:
        self.addresses = parse_addresses(addresses)
        self.options = options
        self._metadata = metadata(options, self.addresses)
        self._channels: list[grpc.aio.Channel] = []
        self._turn = itertools.count()

    async def unary(self, call: Call[T], timeout_s: float | None = None) -> T:
        """Send one call; a repeatable one is tried again, at the next address, until its deadline."""
        until = time.monotonic() + (self.options.timeout_s if timeout_s is None else timeout_s)
        planned = delays(self.options.retries if call.repeatable else 0)
        while True:
            try:
                send = getattr(call.stub(self._next()), call.method)
                answer = await send(call.request, timeout=max(until - time.monotonic(), 0.001), metadata=self._metadata)
                return call.parse(answer)
            except grpc.aio.AioRpcError as failure:
                error = from_rpc_error(failure)
                wait_s = _wait(error, planned, until)
                if wait_s is None:
                    raise error from None
                await asyncio.sleep(wait_s)

    async def many(self, calls: Sequence[Call[T]], timeout_s: float | None = None) -> list[T]:
        """Send several calls, spread over the addresses; answers in the calls' order."""
        at_once = asyncio.Semaphore(CALLS_AT_ONCE_PER_ADDRESS * len(self.addresses))

        async def one(call: Call[T]) -> T:
            async with at_once:
                return await self.unary(call, timeout_s)

        return list(await asyncio.gather(*(one(call) for call in calls)))

    async def stream(self, call: Call[T], timeout_s: float | None = None) -> AsyncIterator[T]:
        """The messages of a server stream; repeated only before the first message came."""
        until = time.monotonic() + (self.options.timeout_s if timeout_s is None else timeout_s)
        planned = delays(self.options.retries if call.repeatable else 0)
        while True:
            started = False
            open_stream = getattr(call.stub(self._next()), call.method)
            stream = open_stream(call.request, timeout=max(until - time.monotonic(), 0.001), metadata=self._metadata)
            try:
                async for message in stream:
                    started = True
                    yield call.parse(message)
                return
            except grpc.aio.AioRpcError as failure:
                error = from_rpc_error(failure)
                wait_s = None if started else _wait(error, planned, until)
                if wait_s is None:
                    raise error from None
                await asyncio.sleep(wait_s)
            finally:
                stream.cancel()

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels:
            await channel.close(None)

    def _next(self) -> grpc.aio.Channel:
        if not self._channels:
            self._channels = [open_async(address, self.options) for address in self.addresses]
        return self._channels[next(self._turn) % len(self._channels)]


def _wait(error: TrimtabError, planned: Iterator[float], until: float) -> float | None:
    """Seconds to wait before the next try, or None where there is none."""
    if not may_repeat(error):
        return None
    delay_s = next(planned, None)
    if delay_s is None:
        return None
    delay_s = delay_for(error, delay_s)
    return delay_s if time.monotonic() + delay_s < until else None
