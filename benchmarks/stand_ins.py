"""Stand-ins for generator, reward and reference with the real wire and injected delays: what overlaps is then known.

Each does one thing at a time, as a device does. A batch of the generator takes `generate_s`, its completions end evenly
spread over it; scoring and referencing a batch take `score_s` and `reference_s` in all, in proportion for parts of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc.aio
import numpy as np

from trimtab_client.ragged import RaggedFloats, RaggedTokens, decode_ids, encode_floats, encode_ids
from trimtab_client.v1 import (
    generator_pb2,
    generator_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
)
from trimtab_client.versions import ModelVersion

DIGEST = "blake3:stand-in"
RESPONSE_TOKENS = 4


@dataclass(frozen=True)
class Delays:
    """Seconds a batch of `batch_size` episodes takes in each service."""

    batch_size: int
    generate_s: float = 1.0
    score_s: float = 0.3
    reference_s: float = 0.3


@dataclass
class Device:
    """Does one thing at a time and counts its busy seconds."""

    busy_s: float = 0.0
    taken: asyncio.Lock = field(default_factory=asyncio.Lock)

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Hold the device; the time held is busy time."""
        async with self.taken:
            started = time.perf_counter()
            try:
                yield
            finally:
                self.busy_s += time.perf_counter() - started


class _Model(model_pb2_grpc.ModelServiceServicer):
    """GetModel and LoadVersion; a load waits until the device is free, as one that drains does."""

    def __init__(self, delays: Delays) -> None:
        self.delays = delays
        self.device = Device()
        self.version = ModelVersion("", "stand-in", 0)

    async def GetModel(self, request: model_pb2.GetModelRequest, context: object) -> model_pb2.GetModelResponse:
        return model_pb2.GetModelResponse(model=self._info())

    async def LoadVersion(
        self, request: model_pb2.LoadVersionRequest, context: object
    ) -> model_pb2.LoadVersionResponse:
        async with self.device.taken:
            self.version = ModelVersion.from_proto(request.version)
        return model_pb2.LoadVersionResponse(model=self._info())

    def _info(self) -> model_pb2.ModelInfo:
        return model_pb2.ModelInfo(version=self.version.to_proto(), tokenizer_digest=DIGEST)


class StandInGenerator(_Model, generator_pb2_grpc.GeneratorServiceServicer):
    """Answers each prompt with the same tokens. `asked` notes the seeds of each call."""

    def __init__(self, delays: Delays) -> None:
        super().__init__(delays)
        self.asked: list[list[int]] = []

    async def Generate(
        self, request: generator_pb2.GenerateRequest, context: object
    ) -> AsyncIterator[generator_pb2.GenerateResponse]:
        self.asked.append([seed for prompt in request.prompts for seed in prompt.seeds])
        each_s = self.delays.generate_s / self.delays.batch_size
        async with self.device.working():
            started = time.perf_counter()
            for index, prompt in enumerate(request.prompts):
                # By the clock: a sleep that ends late on a busy machine must not make the batch longer.
                await asyncio.sleep(max(0.0, started + (index + 1) * each_s - time.perf_counter()))
                yield generator_pb2.GenerateResponse(completion=self._completion(index, prompt))

    def _completion(self, index: int, prompt: generator_pb2.Prompt) -> generator_pb2.Completion:
        return generator_pb2.Completion(
            prompt_index=index,
            prompt_token_ids=prompt.token_ids,
            token_ids=encode_ids(np.arange(RESPONSE_TOKENS, dtype=np.int32) + len(decode_ids(prompt.token_ids, "ids"))),
            logprobs=encode_floats([-1.0] * RESPONSE_TOKENS),
            finish_reason=generator_pb2.FINISH_REASON_STOP,
            versions=[generator_pb2.VersionRun(version=self.version.to_proto(), token_count=RESPONSE_TOKENS)],
            seed=prompt.seeds[0],
        )


class StandInReward(_Model, reward_pb2_grpc.RewardServiceServicer):
    """Scores everything 0."""

    async def Score(self, request: reward_pb2.ScoreRequest, context: object) -> reward_pb2.ScoreResponse:
        count = len(RaggedTokens.from_proto(request.tokens.tokens).sequences())
        async with self.device.working():
            await asyncio.sleep(self.delays.score_s * count / self.delays.batch_size)
        zeros = encode_floats([0.0] * count)
        return reward_pb2.ScoreResponse(scores=zeros, normalized_scores=zeros)


class StandInReference(_Model, reference_pb2_grpc.ReferenceServiceServicer):
    """Gives every response token the log-prob −1."""

    async def LogProbs(self, request: reference_pb2.LogProbsRequest, context: object) -> reference_pb2.LogProbsResponse:
        count = len(RaggedTokens.from_proto(request.tokens).sequences())
        async with self.device.working():
            await asyncio.sleep(self.delays.reference_s * count / self.delays.batch_size)
        logprobs = RaggedFloats.from_sequences([np.full(RESPONSE_TOKENS, -1.0, np.float32)] * count)
        return reference_pb2.LogProbsResponse(logprobs=logprobs.to_proto())


@dataclass(frozen=True)
class StandIns:
    """The three, serving; addresses by name."""

    generator: StandInGenerator
    reward: StandInReward
    reference: StandInReference
    addresses: dict[str, str]

    @property
    def devices(self) -> dict[str, Device]:
        return {"generate": self.generator.device, "score": self.reward.device, "reference": self.reference.device}


@asynccontextmanager
async def standing_in(
    delays: Delays, ports: Mapping[str, int] | None = None, generator: type[StandInGenerator] = StandInGenerator
) -> AsyncIterator[StandIns]:
    """Serve the three on loopback, on free ports where none are named."""
    servicers = {
        "generator": generator(delays),
        "reward": StandInReward(delays),
        "reference": StandInReference(delays),
    }
    adders = {
        "generator": generator_pb2_grpc.add_GeneratorServiceServicer_to_server,
        "reward": reward_pb2_grpc.add_RewardServiceServicer_to_server,
        "reference": reference_pb2_grpc.add_ReferenceServiceServicer_to_server,
    }
    addresses: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        for name, servicer in servicers.items():
            server = grpc.aio.server()
            adders[name](servicer, server)  # type: ignore[arg-type]
            model_pb2_grpc.add_ModelServiceServicer_to_server(servicer, server)
            addresses[name] = f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{(ports or {}).get(name, 0)}')}"
            await server.start()
            stack.push_async_callback(server.stop, None)
        yield StandIns(**servicers, addresses=addresses)  # type: ignore[arg-type]
