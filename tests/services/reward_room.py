"""A running reward server and stubs that speak to it, for tests."""

import os
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from trimtab.reward.config import RewardConfig
from trimtab.reward.service import LABEL, SERVICES, load
from trimtab.runtime.server import RunningServer
from trimtab_client.ragged import RaggedTokens, decode_floats
from trimtab_client.v1 import model_pb2, model_pb2_grpc, reward_pb2, reward_pb2_grpc

TIMEOUT_S = 30


class Peer:
    """A running reward server and stubs that speak to it."""

    def __init__(self, server: RunningServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.stub = reward_pb2_grpc.RewardServiceStub(channel)
        self.models = model_pb2_grpc.ModelServiceStub(channel)

    async def info(self) -> model_pb2.ModelInfo:
        return (await self.models.GetModel(model_pb2.GetModelRequest(), timeout=TIMEOUT_S)).model

    async def send(self, *, within_s: float = TIMEOUT_S, **fields) -> reward_pb2.ScoreResponse:
        return await self.stub.Score(reward_pb2.ScoreRequest(**fields), timeout=within_s)

    async def batch(self, sequences: list[list[int]]) -> reward_pb2.TokenBatch:
        tokens = RaggedTokens.from_sequences(sequences).to_proto()
        return reward_pb2.TokenBatch(tokens=tokens, tokenizer_digest=(await self.info()).tokenizer_digest)

    async def score(self, sequences: list[list[int]], **fields) -> np.ndarray:
        return decode_floats((await self.send(tokens=await self.batch(sequences), **fields)).scores)

    async def load(self, version: model_pb2.ModelVersion) -> model_pb2.ModelInfo:
        request = model_pb2.LoadVersionRequest(version=version)
        return (await self.models.LoadVersion(request, timeout=TIMEOUT_S)).model


@asynccontextmanager
async def serving(folder: Path | str | None, **settings) -> AsyncIterator[Peer]:
    model = {"model": str(folder)} if folder is not None else {}
    config = RewardConfig(**{"port": 0, "metrics_port": None, "threads": 1, **model, **settings})
    async with (
        RunningServer(LABEL, config, services=SERVICES, load=load) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield Peer(server, channel)


async def refusal(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def field_of(error: grpc.aio.AioRpcError) -> str:
    status = status_pb2.Status.FromString(dict(error.trailing_metadata() or ())["grpc-status-details-bin"])
    bad = error_details_pb2.BadRequest()
    status.details[0].Unpack(bad)
    return bad.field_violations[0].field


def children_that_run(module: str, of: int | None = None) -> list[int]:
    """Process ids of `python -m module` that a process, by default this one, has started and that have not ended."""
    parent = of or os.getpid()
    found = map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return [pid for pid in found if f"\0-m\0{module}\0".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()]
