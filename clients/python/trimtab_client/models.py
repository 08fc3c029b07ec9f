"""What the clients of all services share, and ModelService: which weights a server serves, and swapping them."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from trimtab_client.calls import Call, Program
from trimtab_client.channel import Addresses, ChannelOptions
from trimtab_client.messages import ModelInfo
from trimtab_client.transport import SyncTransport
from trimtab_client.transport_aio import AsyncTransport
from trimtab_client.v1 import model_pb2, model_pb2_grpc
from trimtab_client.versions import ModelVersion

DEFAULTS = ChannelOptions()


class ServedLimits:
    """What the server last said of itself; asked for once."""

    def __init__(self) -> None:
        self._info: ModelInfo | None = None

    def note(self, info: ModelInfo) -> ModelInfo:
        """Remember what a server said."""
        self._info = info
        return info

    def get(self) -> Program[ModelInfo]:
        """What is known, or else what the server says."""
        if self._info is None:
            (info,) = yield [get_model()]
            self.note(info)
        assert self._info is not None
        return self._info


def get_model() -> Call[ModelInfo]:
    """The GetModel call."""
    stub, request = model_pb2_grpc.ModelServiceStub, model_pb2.GetModelRequest()
    return Call(stub, "GetModel", request, lambda answer: ModelInfo.from_proto(answer.model))


def load_version(version: ModelVersion, scorer: str = "") -> Call[ModelInfo]:
    """The LoadVersion call; loading what is served already changes nothing, so it may be repeated."""
    request = model_pb2.LoadVersionRequest(version=version.to_proto(), scorer=scorer)
    return Call(
        model_pb2_grpc.ModelServiceStub, "LoadVersion", request, lambda answer: ModelInfo.from_proto(answer.model)
    )


class Client:
    """A blocking client. Each call has a deadline (`timeout_s`, else the options') and raises a TrimtabError.

    Args:
        addresses: "host:port", "a:1,b:2" or a list; calls go to one after another. "dns:///name:port" is every replica
            behind a name, as they come and go.
    """

    def __init__(self, addresses: Addresses, options: ChannelOptions = DEFAULTS) -> None:
        self._transport = SyncTransport(addresses, options)

    @property
    def replicas(self) -> int:
        """How many replicas the addresses are taken to be: one each, more for a "dns:" name."""
        return self._transport.routing.replicas

    def close(self) -> None:
        """Close the channels."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncClient:
    """An asyncio client. Each call has a deadline (`timeout_s`, else the options') and raises a TrimtabError.

    Args:
        addresses: "host:port", "a:1,b:2" or a list; calls go to one after another. "dns:///name:port" is every replica
            behind a name, as they come and go.
    """

    def __init__(self, addresses: Addresses, options: ChannelOptions = DEFAULTS) -> None:
        self._transport = AsyncTransport(addresses, options)

    @property
    def replicas(self) -> int:
        """How many replicas the addresses are taken to be: one each, more for a "dns:" name."""
        return self._transport.routing.replicas

    async def close(self) -> None:
        """Close the channels."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class ModelClient(Client):
    """Any of the three model services."""

    def __init__(self, addresses: Addresses, options: ChannelOptions = DEFAULTS) -> None:
        super().__init__(addresses, options)
        self._limits = ServedLimits()

    def get_model(self, timeout_s: float | None = None) -> ModelInfo:
        """What one of the addresses serves now."""
        return self._limits.note(self._transport.unary(get_model(), timeout_s))

    def load_version(self, version: ModelVersion, timeout_s: float | None = None, *, scorer: str = "") -> ModelInfo:
        """Make every address serve a published version; returns once all do.

        `scorer`: which model of a reward server; empty: its default one.
        """
        return self._limits.note(self._transport.everywhere(load_version(version, scorer), timeout_s)[0])


class AsyncModelClient(AsyncClient):
    """Any of the three model services."""

    def __init__(self, addresses: Addresses, options: ChannelOptions = DEFAULTS) -> None:
        super().__init__(addresses, options)
        self._limits = ServedLimits()

    async def get_model(self, timeout_s: float | None = None) -> ModelInfo:
        """What one of the addresses serves now."""
        return self._limits.note(await self._transport.unary(get_model(), timeout_s))

    async def load_version(
        self, version: ModelVersion, timeout_s: float | None = None, *, scorer: str = ""
    ) -> ModelInfo:
        """Make every address serve a published version; returns once all do.

        `scorer`: which model of a reward server; empty: its default one.
        """
        return self._limits.note((await self._transport.everywhere(load_version(version, scorer), timeout_s))[0])
