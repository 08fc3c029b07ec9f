"""A reward server that is asked four times what it can do goes on doing it, and tells the rest to come again."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from trimtab.models.policy import Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab_client.ragged import RaggedTokens
from trimtab_client.v1 import model_pb2, model_pb2_grpc, reward_pb2, reward_pb2_grpc

SEQUENCES, TOKENS = 64, 60
"""Of one call: enough work for the device that the callers of this process can offer four times as much."""
CALLS_THAT_WAIT = 6
SECONDS = 6.0


@dataclass
class Answers:
    """What a load got: seconds of good answers and of refusals, and the refusals that were not as they should be."""

    good_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@pytest.fixture
def server(tmp_path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A reward server in a process of its own, whose queue is short: the process and its address."""
    ready, log = tmp_path / "ready.json", tmp_path / "log"
    model = tmp_path / "model"
    ScalarModel.from_policy(Policy.load("examples/models/stories260K-hf"), seed=1).save(model)
    command = [sys.executable, "-m", "trimtab", "serve", "reward", "--model", str(model), "--port", "0"]
    settings = {"queue_limit": CALLS_THAT_WAIT * SEQUENCES, "threads": 1, "batch_tokens": SEQUENCES * TOKENS}
    for name, value in (settings | {"ready_file": ready, "metrics_port": 0, "log_level": "error"}).items():
        command += ["--set", f"{name}={value}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=lines, env=environment)
    try:
        until = time.monotonic() + 180
        while not ready.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert ready.exists(), log.read_text()[-2000:]
        yield process, f"127.0.0.1:{json.loads(ready.read_text())['port']}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_at_four_times_its_capacity_it_keeps_its_rate_and_refuses_the_rest_at_once(server):
    process, address = server
    async with grpc.aio.insecure_channel(address) as channel:
        request = await _request(channel)
        score = reward_pb2_grpc.RewardServiceStub(channel).Score
        await _as_fast_as_it_can(score, request, seconds=2.0)
        capacity = await _as_fast_as_it_can(score, request, seconds=SECONDS)
        before_mb = _memory_mb(process)
        answers = await _offer(score, request, calls_per_second=4 * capacity, seconds=SECONDS)
        first_mb = _memory_mb(process)
        again = await _offer(score, request, calls_per_second=4 * capacity, seconds=SECONDS)
        after_mb = _memory_mb(process)
        capacity = min(capacity, await _as_fast_as_it_can(score, request, seconds=SECONDS))  # others may have come
    kept = len(again.good_s) / SECONDS
    refusals_ms = 1e3 * np.percentile(again.refused_s, [50, 99])
    print(
        f"capacity {capacity:.0f} calls/s, {kept:.0f} at four times that; refused {len(again.refused_s)}, "
        f"p50 {refusals_ms[0]:.1f} ms, p99 {refusals_ms[1]:.1f} ms; {before_mb:.0f}, {first_mb:.0f}, {after_mb:.0f} MB"
    )
    assert not answers.wrong + again.wrong
    assert len(again.refused_s) > len(again.good_s), "most of it was too much"
    assert kept > 0.8 * capacity
    assert refusals_ms[1] < 50, "99 of 100"
    assert max(again.good_s) < 30 * (CALLS_THAT_WAIT + 2) / capacity, "what is accepted does not wait for long"
    assert after_mb < first_mb + 15, "memory is flat"


async def _request(channel: grpc.aio.Channel) -> reward_pb2.ScoreRequest:
    info = (await model_pb2_grpc.ModelServiceStub(channel).GetModel(model_pb2.GetModelRequest(), timeout=60)).model
    rng = np.random.default_rng(4)
    tokens = RaggedTokens.from_sequences(rng.integers(3, 500, (SEQUENCES, TOKENS)).tolist()).to_proto()
    return reward_pb2.ScoreRequest(tokens=reward_pb2.TokenBatch(tokens=tokens, tokenizer_digest=info.tokenizer_digest))


async def _as_fast_as_it_can(score, request: reward_pb2.ScoreRequest, *, seconds: float) -> float:
    """Calls a second of three callers that each wait for their answer: the device is never idle."""
    ends, count = time.perf_counter() + seconds, 0

    async def caller() -> None:
        nonlocal count
        while time.perf_counter() < ends:
            await score(request, timeout=60)
            count += 1

    await asyncio.gather(*(caller() for _ in range(3)))
    return count / seconds


async def _offer(score, request: reward_pb2.ScoreRequest, *, calls_per_second: float, seconds: float) -> Answers:
    """Calls at a fixed rate whether or not the earlier ones were answered."""
    answers, calls = Answers(), []

    async def call() -> None:
        sent = time.perf_counter()
        try:
            await score(request, timeout=60)
            answers.good_s.append(time.perf_counter() - sent)
        except grpc.aio.AioRpcError as error:
            answers.refused_s.append(time.perf_counter() - sent)
            if error.code() != StatusCode.RESOURCE_EXHAUSTED or not _says_when(error):
                answers.wrong.append(f"{error.code()} {error.details()}")

    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        calls += [asyncio.create_task(call()) for _ in range(int(elapsed * calls_per_second) - len(calls))]
        await asyncio.sleep(0.005)
    await asyncio.gather(*calls)
    return answers


def _says_when(error: grpc.aio.AioRpcError) -> bool:
    status = status_pb2.Status.FromString(dict(error.trailing_metadata() or ())["grpc-status-details-bin"])
    return any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)


def _memory_mb(process: subprocess.Popen[bytes]) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024
