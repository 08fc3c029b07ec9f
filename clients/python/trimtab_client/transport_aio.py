"""asyncio calls: channels, tasks, cancelling. `transport` is its blocking twin."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc.aio

from trimtab_client.calls import Call, Program, Stream
from trimtab_client.channel import Addresses, ChannelOptions, open_async
from trimtab_client.connections import Connections
from trimtab_client.errors import Cancelled, TrimtabError, from_rpc_error
from trimtab_client.retries import RetryPlan
from trimtab_client.routing import Routing

T = TypeVar("T")


class AsyncTransport:
    """Sends calls over one channel an address; channels open with the first call of an event loop."""

    def __init__(self, addresses: Addresses, options: ChannelOptions) -> None:
        self.routing: Routing = Routing(addresses, options)
        self._closing: set[asyncio.Task[None]] = set()
        self._connections = Connections(
            self.routing.addresses,
            options,
            opener=open_async,
            closer=self._close_soon,
            scope=asyncio.get_running_loop,
        )

    async def run(self, program: Program[T], timeout_s: float | None = None) -> T:
        """Carry out a program; one deadline for all its calls."""
        return await self._run(program, self.routing.until(timeout_s))

    async def unary(self, call: Call[T], timeout_s: float | None = None) -> T:
        """Send one call; a repeatable one is tried again, at the other addresses too, until its deadline."""
        return await self._unary(call, self.routing.until(timeout_s))

    async def everywhere(self, call: Call[T], timeout_s: float | None = None) -> list[T]:
        """Send one call to each address; answers in the addresses' order."""
        until = self.routing.until(timeout_s)

        async def one(place: int) -> T:
            return await self._unary(call, until, only=place)

        places = range(len(self.routing.addresses))
        return await _at_once(one, places, len(places))

    async def streams(
        self, program: Program[Sequence[Stream[T]]], timeout_s: float | None = None
    ) -> AsyncGenerator[T, None]:
        """The items of all streams that a program makes, as they come; one deadline for all."""
        until = self.routing.until(timeout_s)
        streams = await self._run(program, until)
        items = self._stream(streams[0], until) if len(streams) == 1 else self._merged(streams, until)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()

    async def close(self) -> None:
        """Close all channels; what is in flight is cancelled."""
        for channel in self._connections.close():
            await channel.close(None)

    async def _run(self, program: Program[T], until: float) -> T:
        async def one(call: Call[Any]) -> Any:
            return await self._unary(call, until)

        try:
            calls = next(program)
            while True:
                calls = program.send(await _at_once(one, calls, self.routing.calls_at_once))
        except StopIteration as end:
            return end.value

    async def _unary(self, call: Call[T], until: float, only: int | None = None) -> T:
        places, retries = self.routing.places(only), self.routing.retries(call, until, only)
        while True:
            try:
                with self._connections.using(next(places)) as connection:
                    rpc = connection.method(call)(call.request, **self.routing.sending(until))
                    return call.read(await rpc)
            except grpc.aio.AioRpcError as failure:
                await _pause(retries, call.located(from_rpc_error(failure)))
            except asyncio.CancelledError as cancelled:
                raise _whose(cancelled) from None

    async def _stream(self, stream: Stream[T], until: float) -> AsyncGenerator[T, None]:
        places, retries = self.routing.places(), None
        while (call := stream.next_call()) is not None:
            retries = retries or self.routing.retries(call, until)
            try:
                with self._connections.using(next(places)) as connection:
                    rpc = connection.method(call)(call.request, **self.routing.sending(until))
                    try:
                        async for message in rpc:
                            item = stream.accept(call.read(message))
                            retries.progressed()
                            yield item
                    finally:
                        rpc.cancel()
                stream.ended()
            except grpc.aio.AioRpcError as failure:
                error = call.located(from_rpc_error(failure))
                if not stream.may_resume():
                    raise error from None
                if stream.next_call() is not None:
                    await _pause(retries, error)
            except asyncio.CancelledError as cancelled:
                raise _whose(cancelled) from None

    async def _merged(self, streams: Sequence[Stream[T]], until: float) -> AsyncGenerator[T, None]:
        at_once = asyncio.Semaphore(self.routing.calls_at_once)
        arrived: asyncio.Queue[T | _Ended] = asyncio.Queue()

        async def follow(stream: Stream[T]) -> None:
            failure: Exception | None = None
            try:
                async with at_once:
                    async for item in self._stream(stream, until):
                        arrived.put_nowait(item)
            except Exception as error:
                failure = error
            arrived.put_nowait(_Ended(failure))

        tasks = [asyncio.create_task(follow(stream)) for stream in streams]
        try:
            running = len(tasks)
            while running:
                item = await arrived.get()
                if not isinstance(item, _Ended):
                    yield item
                elif item.failure is None:
                    running -= 1
                else:
                    raise item.failure
        finally:
            await _cancel(tasks)

    def _close_soon(self, channel: grpc.aio.Channel) -> None:
        """Close a channel that was replaced and whose last call has ended."""
        task = asyncio.get_running_loop().create_task(channel.close(None))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class _Ended:
    """A stream's end, in the queue of what arrived."""

    def __init__(self, failure: Exception | None) -> None:
        self.failure = failure


async def _pause(retries: RetryPlan, error: TrimtabError) -> None:
    """Wait for the next try; raises the error where there is none."""
    wait_s = retries.wait_s(error)
    if wait_s is None:
        raise error from None
    await asyncio.sleep(wait_s)


def _whose(cancelled: asyncio.CancelledError) -> BaseException:
    """The task's own cancellation as it is, that of a closed channel (which gRPC reports alike) as Cancelled."""
    task = asyncio.current_task()
    if task is None or task.cancelling():
        return cancelled
    return Cancelled("CANCELLED", "cancelled on this side")


async def _at_once(one: Callable[[Any], Coroutine[Any, Any, T]], items: Sequence[Any], most: int) -> list[T]:
    """`one` of each item, several at a time; the first failure cancels the rest."""
    if len(items) <= 1:
        return [await one(item) for item in items]
    at_once = asyncio.Semaphore(most)

    async def limited(item: Any) -> T:
        async with at_once:
            return await one(item)

    tasks = [asyncio.create_task(limited(item)) for item in items]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
