"""Real gRPC servers with answers that a test can foretell, and the SDK in both its styles before them."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

import trimtab_client
from trimtab.runtime.errors import ServiceError, abort
from trimtab_client import ChannelOptions, ModelVersion, RaggedFloats, RaggedTokens, encode_floats, encode_ids
from trimtab_client.v1 import (
    generator_pb2,
    generator_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
    trainer_pb2,
    trainer_pb2_grpc,
)

VERSION = ModelVersion("run", "policy", 7, "blake3:aa")
DIGEST = "blake3:tokenizer"


class Room(
    model_pb2_grpc.ModelServiceServicer,
    generator_pb2_grpc.GeneratorServiceServicer,
    reward_pb2_grpc.RewardServiceServicer,
    reference_pb2_grpc.ReferenceServiceServicer,
    trainer_pb2_grpc.TrainerServiceServicer,
):
    """All five services.

    A sequence's score is the sum of its ids; the log-prob of a response token is minus its id; a completion is the
    low half of its seed. `failures[method]` are raised first, one a call. A Generate stream breaks after
    `break_after` completions, once.
    """

    def __init__(self, max_sequences: int = 0, max_tokens: int = 0) -> None:
        self.address = ""
        self.version = VERSION
        self.limits = {"max_sequences": max_sequences, "max_tokens": max_tokens}
        self.calls: dict[str, list[Any]] = defaultdict(list)
        self.metadata: list[dict[str, Any]] = []
        self.peers: dict[str, list[str]] = defaultdict(list)
        self.deadlines_s: list[float | None] = []
        self.failures: dict[str, deque[ServiceError]] = defaultdict(deque)
        self.delay_s = 0.0
        self.pause_between_s = 0.0
        self.score_delay_s = 0.0
        self.break_after: int | None = None
        self.lose = 0
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def enter(self, method: str, request: Any, context: grpc.aio.ServicerContext) -> None:
        self.calls[method].append(request)
        self.entered.set()
        self.metadata.append(dict(context.invocation_metadata() or ()))
        names = context.auth_context().get("x509_subject_alternative_name", ())
        self.peers[method].append(",".join(name.decode() for name in names))
        self.deadlines_s.append(context.time_remaining())
        if self.failures[method]:
            await abort(context, self.failures[method].popleft())
        await self.pause(self.delay_s)

    async def pause(self, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    def info(self) -> model_pb2.ModelInfo:
        return model_pb2.ModelInfo(
            version=self.version.to_proto(), tokenizer_digest=DIGEST, vocab_size=100, eos_token_ids=[2], **self.limits
        )

    async def GetModel(self, request: Any, context: Any) -> model_pb2.GetModelResponse:
        await self.enter("GetModel", request, context)
        return model_pb2.GetModelResponse(model=self.info())

    async def LoadVersion(self, request: Any, context: Any) -> model_pb2.LoadVersionResponse:
        await self.enter("LoadVersion", request, context)
        self.version = ModelVersion.from_proto(request.version)
        return model_pb2.LoadVersionResponse(model=self.info())

    async def Score(self, request: Any, context: Any) -> reward_pb2.ScoreResponse:
        await self.enter("Score", request, context)
        await self.pause(self.score_delay_s)
        if request.version.HasField("exact"):
            self.version = ModelVersion.from_proto(request.version.exact)
        scores = [float(value) for value in self.sums(request)][self.lose :]
        return reward_pb2.ScoreResponse(
            scores=encode_floats(scores),
            normalized_scores=encode_floats(np.array(scores) + 1),
            version=self.version.to_proto(),
            truncated=[0] if request.truncate else [],
        )

    def sums(self, request: Any) -> list[float]:
        match request.WhichOneof("input"):
            case "tokens":
                return [s.sum() for s in RaggedTokens.from_proto(request.tokens.tokens).sequences()]
            case "texts":
                return [len(item.response) for item in request.texts.items]
            case _:
                return [len(item.messages) for item in request.conversations.conversations]

    async def LogProbs(self, request: Any, context: Any) -> reference_pb2.LogProbsResponse:
        await self.enter("LogProbs", request, context)
        tokens = RaggedTokens.from_proto(request.tokens)
        assert tokens.prompt_lengths is not None
        prompts = tokens.prompt_lengths.tolist()
        responses = [ids[prompt:] for ids, prompt in zip(tokens.sequences(), prompts, strict=True)][self.lose :]
        values = RaggedFloats.from_sequences([-ids.astype(np.float32) for ids in responses])
        answer = reference_pb2.LogProbsResponse(logprobs=values.to_proto(), version=self.version.to_proto())
        if request.include_lse:
            answer.lse.CopyFrom(RaggedFloats(values.values * 2, values.lengths).to_proto())
        if request.include_entropy:
            answer.entropy.CopyFrom(RaggedFloats(values.values * 3, values.lengths).to_proto())
        if request.include_hidden:
            answer.hidden_size = 2
            answer.hidden = np.repeat(np.concatenate(responses).astype("<u2"), 2).tobytes()
        return answer

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[generator_pb2.GenerateResponse]:
        await self.enter("Generate", request, context)
        samples = max(1, request.sampling.n)
        asked = [(p, s) for p in range(len(request.prompts)) for s in range(samples)]
        for sent, (p, s) in enumerate(reversed(asked[self.lose :])):
            await self.pause(self.pause_between_s if sent else 0.0)
            await self.maybe_break(sent, context)
            prompt = request.prompts[p]
            ids = [prompt.seeds[s] % 2**31]
            completion = generator_pb2.Completion(
                prompt_index=p,
                sample_index=s,
                prompt_token_ids=prompt.token_ids,
                token_ids=encode_ids(ids),
                logprobs=encode_floats([-0.5]),
                text=prompt.text or (prompt.chat.messages[0].content if prompt.chat.messages else ""),
                finish_reason=generator_pb2.FINISH_REASON_STOP,
                versions=[generator_pb2.VersionRun(version=self.version.to_proto(), token_count=1)],
                seed=prompt.seeds[s],
            )
            try:
                yield generator_pb2.GenerateResponse(completion=completion)
            except (asyncio.CancelledError, GeneratorExit):
                self.cancelled.set()
                raise
        await self.maybe_break(len(asked), context)

    async def maybe_break(self, sent: int, context: grpc.aio.ServicerContext) -> None:
        if self.break_after == sent:
            self.break_after = None
            await context.abort(grpc.StatusCode.UNAVAILABLE, "draining")

    def status(self, state: str = "RUNNING", run_id: str = "r") -> trainer_pb2.RunStatus:
        state_value = trainer_pb2.RunState.Value(f"RUN_STATE_{state}")
        return trainer_pb2.RunStatus(run_id=run_id, stage="sft", state=state_value, published=[self.version.to_proto()])

    async def Start(self, request: Any, context: Any) -> trainer_pb2.StartResponse:
        await self.enter("Start", request, context)
        return trainer_pb2.StartResponse(status=self.status(run_id=request.run_id))

    async def Status(self, request: Any, context: Any) -> trainer_pb2.StatusResponse:
        await self.enter("Status", request, context)
        return trainer_pb2.StatusResponse(status=self.status())

    async def Pause(self, request: Any, context: Any) -> trainer_pb2.PauseResponse:
        await self.enter("Pause", request, context)
        return trainer_pb2.PauseResponse(status=self.status("PAUSED"))

    async def Resume(self, request: Any, context: Any) -> trainer_pb2.ResumeResponse:
        await self.enter("Resume", request, context)
        return trainer_pb2.ResumeResponse(status=self.status())

    async def Stop(self, request: Any, context: Any) -> trainer_pb2.StopResponse:
        await self.enter("Stop", request, context)
        return trainer_pb2.StopResponse(status=self.status("STOPPED"))

    async def Checkpoint(self, request: Any, context: Any) -> trainer_pb2.CheckpointResponse:
        await self.enter("Checkpoint", request, context)
        return trainer_pb2.CheckpointResponse(published=[self.version.to_proto()])

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[trainer_pb2.WatchResponse]:
        await self.enter("Watch", request, context)
        for step in range(request.after_step + 1, 4):
            metrics = trainer_pb2.StepMetrics(run_id="r", stage="sft", step=step, total_steps=3, values={"loss": 0.5})
            yield trainer_pb2.WatchResponse(metrics=metrics)
        if self.failures["Watching"]:
            await abort(context, self.failures["Watching"].popleft())
        yield trainer_pb2.WatchResponse(status=self.status("SUCCEEDED"))


Rooms = Callable[..., Awaitable[Room]]


@pytest.fixture
async def rooms() -> AsyncIterator[Rooms]:
    """Opens servers: `await rooms(max_sequences=4)`; `credentials` for TLS, `address` for a given port."""
    servers: list[grpc.aio.Server] = []

    async def open_room(
        credentials: grpc.ServerCredentials | None = None, address: str = "127.0.0.1:0", **limits: int
    ) -> Room:
        room = Room(**limits)
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        model_pb2_grpc.add_ModelServiceServicer_to_server(room, server)
        generator_pb2_grpc.add_GeneratorServiceServicer_to_server(room, server)
        reward_pb2_grpc.add_RewardServiceServicer_to_server(room, server)
        reference_pb2_grpc.add_ReferenceServiceServicer_to_server(room, server)
        trainer_pb2_grpc.add_TrainerServiceServicer_to_server(room, server)
        port = (
            server.add_secure_port(address, credentials)
            if credentials is not None
            else server.add_insecure_port(address)
        )
        await server.start()
        servers.append(server)
        room.address = f"127.0.0.1:{port}"
        return room

    yield open_room
    for server in servers:
        await server.stop(None)


class Sdk:
    """One call of a fresh client, blocking (in a thread) or asyncio; streams come back as lists."""

    def __init__(self, style: str) -> None:
        self.style = style

    async def call(
        self,
        client: str,
        addresses: str | list[str],
        method: str,
        *args: Any,
        options: ChannelOptions | None = None,
        **named: Any,
    ) -> Any:
        options = options or ChannelOptions(timeout_s=10)
        if self.style == "sync":
            return await asyncio.to_thread(self._sync, client, addresses, method, args, options, named)
        async with getattr(trimtab_client, f"Async{client}Client")(addresses, options) as opened:
            answer = getattr(opened, method)(*args, **named)
            return [item async for item in answer] if hasattr(answer, "__aiter__") else await answer

    def _sync(self, client: str, addresses: Any, method: str, args: Any, options: Any, named: Any) -> Any:
        with getattr(trimtab_client, f"{client}Client")(addresses, options) as opened:
            answer = getattr(opened, method)(*args, **named)
            return list(answer) if isinstance(answer, Iterator) else answer


@pytest.fixture(params=["sync", "asyncio"])
def sdk(request: pytest.FixtureRequest) -> Sdk:
    """The SDK in either style."""
    return Sdk(request.param)


@pytest.fixture
def ragged() -> Callable[..., RaggedTokens]:
    """`ragged(5)`: five sequences [1], [2, 2], [3, 3, 3] …, each with one prompt token."""

    def make(count: int) -> RaggedTokens:
        return RaggedTokens.from_sequences([[i] * i for i in range(1, count + 1)], prompt_lengths=[1] * count)

    return make
