"""A generator in front of the generator: ends the response to each prompt after that prompt's own number of tokens.

A Generate request has one max_tokens, the ragged benchmark one length a prompt. So a trainer is pointed at this proxy,
which splits its request by length, asks the real generator (another process) for the parts at once, and sends the
completions on as they come. All else (model info, new versions, pins, seeds) goes through as it is. The proxy computes
nothing; what it costs counts against our own side.
"""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from typing import NoReturn, cast

import grpc
import grpc.aio

from trimtab_client.v1 import generator_pb2, generator_pb2_grpc, model_pb2, model_pb2_grpc

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1), ("grpc.enable_http_proxy", 0)]


class LengthsProxy:
    """`with LengthsProxy(generator_address, lengths) as proxy: proxy.address`; runs on a thread of its own.

    `lengths` gives the response length, in tokens, of each prompt (little-endian int32 ids as bytes).
    """

    def __init__(self, generator_address: str, lengths: Mapping[bytes, int]) -> None:
        self.address = ""
        self._upstream = generator_address
        self._lengths = lengths
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)

    def __enter__(self) -> LengthsProxy:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _serve(self) -> None:
        async with grpc.aio.insecure_channel(self._upstream, options=OPTIONS) as channel:
            server = grpc.aio.server(options=OPTIONS)
            generator_pb2_grpc.add_GeneratorServiceServicer_to_server(_Generator(channel, self._lengths), server)
            model_pb2_grpc.add_ModelServiceServicer_to_server(_Model(channel), server)
            self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            self._started.set()
            await self._stop.wait()
            await server.stop(0)


class _Generator(generator_pb2_grpc.GeneratorServiceServicer):
    def __init__(self, channel: grpc.aio.Channel, lengths: Mapping[bytes, int]) -> None:
        self._stub = generator_pb2_grpc.GeneratorServiceStub(channel)
        self._lengths = lengths

    async def Generate(
        self, request: generator_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        arrived: asyncio.Queue[generator_pb2.GenerateResponse | None] = asyncio.Queue()

        async def fetch() -> None:
            parts = (self._part(request, indices, arrived, context) for indices in self._by_length(request))
            try:
                await asyncio.gather(*parts)
            finally:
                arrived.put_nowait(None)

        fetching = asyncio.ensure_future(fetch())
        try:
            while (response := await arrived.get()) is not None:
                yield response
            await fetching
        except grpc.aio.AioRpcError as error:
            await _answer_with(error, context)
        finally:
            fetching.cancel()

    def _by_length(self, request: generator_pb2.GenerateRequest) -> list[list[int]]:
        """Prompt indices of the same length together, long ones first."""
        groups: dict[int, list[int]] = defaultdict(list)
        for index, prompt in enumerate(request.prompts):
            groups[self._lengths[prompt.token_ids]].append(index)
        return [groups[length] for length in sorted(groups, reverse=True)]

    async def _part(
        self,
        request: generator_pb2.GenerateRequest,
        indices: list[int],
        arrived: asyncio.Queue[generator_pb2.GenerateResponse | None],
        context: grpc.aio.ServicerContext,
    ) -> None:
        part = generator_pb2.GenerateRequest(prompts=[request.prompts[i] for i in indices])
        part.sampling.CopyFrom(request.sampling)
        part.sampling.max_tokens = self._lengths[request.prompts[indices[0]].token_ids]
        if request.HasField("version"):
            part.version.CopyFrom(request.version)
        async for response in self._stub.Generate(part, timeout=context.time_remaining()):
            response.completion.prompt_index = indices[response.completion.prompt_index]
            arrived.put_nowait(response)


class _Model(model_pb2_grpc.ModelServiceServicer):
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = model_pb2_grpc.ModelServiceStub(channel)

    async def GetModel(
        self, request: model_pb2.GetModelRequest, context: grpc.aio.ServicerContext
    ) -> model_pb2.GetModelResponse:
        try:
            return await self._stub.GetModel(request, timeout=context.time_remaining())
        except grpc.aio.AioRpcError as error:
            return await _answer_with(error, context)

    async def LoadVersion(
        self, request: model_pb2.LoadVersionRequest, context: grpc.aio.ServicerContext
    ) -> model_pb2.LoadVersionResponse:
        try:
            return await self._stub.LoadVersion(request, timeout=context.time_remaining())
        except grpc.aio.AioRpcError as error:
            return await _answer_with(error, context)


async def _answer_with(error: grpc.aio.AioRpcError, context: grpc.aio.ServicerContext) -> NoReturn:
    """End a call as the generator ended it, details included."""
    trailers = cast("tuple[tuple[str, str | bytes], ...]", tuple(error.trailing_metadata() or ()))
    await context.abort(error.code(), error.details() or "", trailers)
    raise AssertionError("abort always raises")
