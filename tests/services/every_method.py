"""Every gRPC service of trimtab, found by its generated stubs, with servants that answer empty messages."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection

import trimtab
import trimtab_client
from trimtab.runtime.server import Service

HEALTH = ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List")
REFLECTION = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"


@dataclass(frozen=True)
class Method:
    """One RPC: "/package.Service/Name" and whether it streams answers, or both ways."""

    path: str
    streams: bool = False
    converses: bool = False

    async def call(self, channel: grpc.aio.Channel, token: str | None = None) -> grpc.StatusCode:
        """Call it with an empty request; the code that comes back.

        gRPC's asyncio client says INTERNAL where a server has refused a conversation before the client wrote to it:
        such a call is made again.
        """
        for _ in range(20 if self.converses else 1):
            code = await self._call(channel, token)
            if code != grpc.StatusCode.INTERNAL:
                break
        return code

    async def _call(self, channel: grpc.aio.Channel, token: str | None) -> grpc.StatusCode:
        metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
        try:
            if self.converses:
                conversation = channel.stream_stream(self.path)(metadata=metadata, timeout=10)
                await conversation.write(b"")
                await conversation.done_writing()
                await conversation.read()
            elif self.streams:
                async for _ in channel.unary_stream(self.path)(b"", metadata=metadata, timeout=10):
                    pass
            else:
                await channel.unary_unary(self.path)(b"", metadata=metadata, timeout=10)
        except grpc.aio.AioRpcError as error:
            assert token is None or token not in (error.details() or "")
            return error.code()
        return grpc.StatusCode.OK


def stub_modules() -> list[str]:
    """The generated message modules of the client and of every room."""
    folders = [Path(path) for package in (trimtab, trimtab_client) for path in package.__path__]
    files = sorted(file for folder in folders for file in folder.rglob("*_pb2.py"))
    return [".".join(file.with_suffix("").relative_to(_root(file)).parts) for file in files]


def services() -> dict[str, tuple[ServiceDescriptor, str]]:
    """Every service by full name: its descriptor and its stubs' module."""
    found = {}
    for module in stub_modules():
        for service in importlib.import_module(module).DESCRIPTOR.services_by_name.values():
            found[service.full_name] = service, f"{module}_grpc"
    return found


def methods() -> list[Method]:
    """Every method of `services`, and reflection."""
    found = [
        Method(f"/{name}/{method.name}", method.server_streaming)
        for name, (descriptor, _) in services().items()
        for method in descriptor.methods
    ]
    return [*found, Method(REFLECTION, converses=True)]


def servants() -> Sequence[Service]:
    """All services, each method answered with an empty message (a stream with nothing)."""
    made = []
    for name, (descriptor, module) in services().items():
        stubs = importlib.import_module(module)
        servicer = type(descriptor.name, (), {method.name: _servant(method) for method in descriptor.methods})
        made.append(Service(name, getattr(stubs, f"add_{descriptor.name}Servicer_to_server"), servicer()))
    return made


def _servant(method: MethodDescriptor) -> Any:
    answer = GetMessageClass(method.output_type)

    async def unary(self: object, request: Any, context: Any) -> Any:
        return answer()

    async def stream(self: object, request: Any, context: Any) -> Any:
        for message in ():
            yield message

    return stream if method.server_streaming else unary


def _root(file: Path) -> Path:
    """The folder that the top package of a file is in."""
    top = file.parent
    while (top.parent / "__init__.py").exists():
        top = top.parent
    return top.parent
