"""Thousands of spoiled requests to every RPC: each is answered by type, naming the field, and nothing is worn out."""

from __future__ import annotations

import asyncio
import collections
import json
import random
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode

from tests.services.bad_input.conftest import Running
from tests.services.bad_input.mutations import mutated
from tests.services.bad_input.requests import Target, targets
from trimtab_client.v1 import model_pb2

REFUSALS = {
    StatusCode.INVALID_ARGUMENT,
    StatusCode.FAILED_PRECONDITION,
    StatusCode.NOT_FOUND,
    StatusCode.ALREADY_EXISTS,
    StatusCode.RESOURCE_EXHAUSTED,
}
"""What a caller can do something about; and UNAVAILABLE, where a version is pinned that may still come."""
AT_ONCE = 24
PATIENCE_S = 120.0
PINNED_AT_ONCE, PINNED_PATIENCE_S = 400, 10.0
"""Calls that wait for a version, which cost nothing meanwhile, and for how long they do."""
GROWTH_MB = 60
"""What caches of all five services may still grow by once each RPC has seen some hundreds of requests."""


def refuses(target: Target, data: bytes, error: grpc.aio.AioRpcError) -> str | None:
    """What is wrong with a refusal; None where it is as it should be."""
    message, code = error.details() or "", error.code()
    status = status_pb2.Status.FromString(dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b""))
    kinds = {detail.type_url.rpartition(".")[2]: detail for detail in status.details}
    if code == StatusCode.UNAVAILABLE:
        return None if "RetryInfo" in kinds and "version" not in kinds and _is_pinned(target, data) else "not pinned"
    if code == StatusCode.DEADLINE_EXCEEDED and target.streams:
        return None  # Watch goes on as long as the run does
    if code not in REFUSALS:
        return "no refusal that a caller can act on"
    if code == StatusCode.RESOURCE_EXHAUSTED:
        return None if "RetryInfo" in kinds or "larger than max" in message else "no RetryInfo"
    if not message:
        return "says nothing"
    if code == StatusCode.INVALID_ARGUMENT:
        bad = error_details_pb2.BadRequest()
        if "BadRequest" not in kinds or not kinds["BadRequest"].Unpack(bad) or not bad.field_violations[0].field:
            return "names no field"
    return None


def _is_pinned(target: Target, data: bytes) -> bool:
    try:
        request = type(target.requests[0]).FromString(data)  # type: ignore[attr-defined]
    except Exception:
        return False
    if getattr(request, "model_version", ""):  # the Open Inference Protocol's
        return True
    version: Any = getattr(request, "version", None)
    return isinstance(version, model_pb2.VersionPin) and request.HasField("version")


async def _answer(
    channel: grpc.aio.Channel, target: Target, data: bytes, timeout_s: float
) -> grpc.aio.AioRpcError | None:
    """The error that a call ends with; None where it ends well."""
    try:
        if target.streams:
            async for _ in channel.unary_stream(target.path)(data, timeout=timeout_s):
                pass
        else:
            await channel.unary_unary(target.path)(data, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return error
    return None


class Sender:
    """Sends spoiled requests and keeps what was answered."""

    def __init__(self, running: Running, channels: dict[str, grpc.aio.Channel]) -> None:
        self.running = running
        self.channels = channels
        self.codes: collections.Counter[tuple[str, str]] = collections.Counter()
        self.wrong: list[str] = []
        self._free = {True: asyncio.Semaphore(PINNED_AT_ONCE), False: asyncio.Semaphore(AT_ONCE)}

    async def send(self, target: Target, data: bytes, what: str) -> None:
        waits = _is_pinned(target, data) or "Watch" in target.path
        async with self._free[waits]:
            channel = self.channels[target.server]
            timeout_s = PINNED_PATIENCE_S if waits else PATIENCE_S
            error = await _answer(channel, target, data, timeout_s)
            if waits and not target.streams and error is not None and error.code() == StatusCode.DEADLINE_EXCEEDED:
                # The second kept for the answer is little where the machine stalls: once more, as a caller would.
                error = await _answer(channel, target, data, timeout_s)
            code = StatusCode.OK if error is None else error.code()
            if error is not None and (fault := refuses(target, data, error)) is not None:
                said = f"{target.path}: {code.name} {error.details()!r:.300}, {fault}, after {what}: {data[:200]!r}"
                self.wrong.append(said)
            self.codes[target.path, code.name] += 1

    async def spoil(self, all_targets: list[Target], count: int, rng: random.Random) -> None:
        """`count` requests, in turn to every RPC."""
        sending: set[asyncio.Task[None]] = set()
        for number in range(count):
            target = all_targets[number % len(all_targets)]
            data, what = mutated(rng.choice(target.requests), rng)
            task = asyncio.create_task(self.send(target, data, what))
            sending.add(task)
            task.add_done_callback(sending.discard)
            if len(sending) >= PINNED_AT_ONCE + 2 * AT_ONCE:
                await asyncio.wait(sending, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.gather(*sending)


async def spoil_every_rpc(running: Running, *, warm_up: int, count: int, seed: int) -> Sender:
    """Warm up, then send `count` requests; asserts that all were refused well and that nothing was worn out."""
    all_targets = targets(running.digest)
    assert len({target.path for target in all_targets}) >= 12
    channels = {name: grpc.aio.insecure_channel(address) for name, address in running.addresses.items()}
    sender, rng = Sender(running, channels), random.Random(seed)
    await sender.spoil(all_targets, warm_up, rng)
    before_mb = running.memory_mb()
    await sender.spoil(all_targets, count, rng)
    grown_mb = running.memory_mb() - before_mb
    for target in all_targets:  # and good requests are answered as ever
        await sender.send(target, target.requests[0].SerializeToString(), "nothing")
    await asyncio.gather(*(channel.close() for channel in channels.values()))
    kinds = {wrong[:90]: wrong for wrong in sender.wrong}
    assert not kinds, "\n".join([f"{len(sender.wrong)} wrong answers, of each kind one:", *list(kinds.values())[:30]])
    assert running.process.poll() is None
    assert grown_mb < GROWTH_MB, f"{before_mb:.0f} MB grew by {grown_mb:.0f} MB over {count} requests"
    return sender


async def test_spoiled_requests_are_refused_by_field_and_wear_nothing_out(running):
    sender = await spoil_every_rpc(running, warm_up=800, count=2200, seed=20_260)
    refused = {path for path, code in sender.codes if code == "INVALID_ARGUMENT"}
    takes_something = {target.path for target in targets(running.digest) if target.requests[0].ByteSize()}
    assert refused >= takes_something, "every RPC that takes something refused something"
    assert sender.codes["/trimtab.v1.RewardService/Score", "OK"] > 0, "some stayed good"


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_a_hundred_thousand_spoiled_requests_wear_nothing_out(running):
    sender = await spoil_every_rpc(running, warm_up=4000, count=100_000, seed=7)
    print(json.dumps({f"{path} {code}": count for (path, code), count in sorted(sender.codes.items())}, indent=1))
