"""A server of a few lines on the runtime, for tests of processes: `runtime_room.py MODE key=value…`.

It answers LogProbs after `temperature` seconds, which it spends on the device thread where include_lse is set, and on
the event loop, which it blocks, where include_entropy is.
MODE: "serve", "fail" (its load raises a StartError), "defect" (its
load has a bug) or "hang" (its load never ends).
"""

import asyncio
import sys
import time
from collections.abc import Sequence

import grpc.aio

from trimtab.runtime.config import ConfigError, ServiceConfig, load_config
from trimtab.runtime.device_worker import DeviceWorker
from trimtab.runtime.errors import StartError
from trimtab.runtime.server import ServerContext, Service, serve
from trimtab_client.v1 import reference_pb2, reference_pb2_grpc

NAME = "trimtab.v1.ReferenceService"


class Slow(reference_pb2_grpc.ReferenceServiceServicer):
    def __init__(self, worker: DeviceWorker) -> None:
        self.worker = worker

    async def LogProbs(
        self, request: reference_pb2.LogProbsRequest, context: grpc.aio.ServicerContext
    ) -> reference_pb2.LogProbsResponse:
        if request.include_lse:
            await self.worker.run(time.sleep, request.temperature)
        elif request.include_entropy:
            time.sleep(request.temperature)  # noqa: ASYNC251 (the fault that is wanted)
        else:
            await asyncio.sleep(request.temperature)
        return reference_pb2.LogProbsResponse(hidden_size=7)


async def load(context: ServerContext) -> Sequence[Service]:
    mode = sys.argv[1]
    if mode == "fail":
        raise StartError("model: /nowhere is not a model folder")
    if mode == "defect":
        raise KeyError("a bug")
    if mode == "hang":
        await asyncio.Event().wait()
    return [Service(NAME, reference_pb2_grpc.add_ReferenceServiceServicer_to_server, Slow(context.worker))]


def main() -> int:
    try:
        flags = dict(argument.split("=", 1) for argument in sys.argv[2:])
        config = load_config(ServiceConfig, None, flags)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return serve("room", config, services=[NAME], load=load)


if __name__ == "__main__":
    sys.exit(main())
