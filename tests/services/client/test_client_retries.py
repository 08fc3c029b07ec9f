"""Which failed calls the SDK repeats, when, and where."""

import asyncio
import os
import socket
import subprocess
import sys
import time

import pytest
from grpc import StatusCode

from trimtab.runtime.errors import ServiceError, exhausted, precondition, unavailable
from trimtab_client import (
    AsyncTrainerClient,
    ChannelOptions,
    FailedPrecondition,
    Internal,
    ResourceExhausted,
    Sampling,
    Unavailable,
)
from trimtab_client.v1 import trainer_pb2

DIGEST = "blake3:tokenizer"
FEW = ChannelOptions(timeout_s=10, retries=2)


def soon():
    return unavailable("loading", retry_after_s=0.0)


@pytest.mark.parametrize(
    ("client", "method", "rpc"),
    [
        ("Reward", "get_model", "GetModel"),
        ("Reward", "load_version", "LoadVersion"),
        ("Reward", "score_tokens", "Score"),
        ("Reference", "logprobs", "LogProbs"),
        ("Trainer", "status", "Status"),
        ("Trainer", "start", "Start"),
    ],
)
async def test_unavailable_is_tried_again_where_a_repeat_is_harmless(rooms, sdk, ragged, client, method, rpc):
    room = await rooms()
    room.failures[rpc].extend([soon(), soon()])
    arguments = {
        "load_version": (room.version,),
        "score_tokens": (ragged(2), DIGEST),
        "logprobs": (ragged(2), DIGEST),
        "start": ("r", trainer_pb2.PpoConfig()),
    }
    await sdk.call(client, room.address, method, *arguments.get(method, ()), options=FEW)
    assert len(room.calls[rpc]) == 3


async def test_a_call_that_a_stopping_server_cancels_goes_to_the_next(rooms, sdk, ragged):
    rooms_ = [await rooms(), await rooms()]
    for room in rooms_:
        room.failures["Score"].append(ServiceError(StatusCode.CANCELLED, "Cancelling all calls"))
    addresses = [room.address for room in rooms_]
    await sdk.call("Reward", addresses, "score_tokens", ragged(2), DIGEST, options=FEW)
    assert sum(len(room.calls["Score"]) for room in rooms_) == 3


@pytest.mark.parametrize("method", ["pause", "resume", "stop", "checkpoint"])
async def test_what_may_not_happen_twice_is_sent_once(rooms, sdk, method):
    room = await rooms()
    room.failures[method.capitalize()].append(soon())
    with pytest.raises(Unavailable, match="loading"):
        await sdk.call("Trainer", room.address, method)
    assert len(room.calls[method.capitalize()]) == 1


async def test_retries_end(rooms, sdk):
    room = await rooms()
    room.failures["GetModel"].extend(soon() for _ in range(9))
    with pytest.raises(Unavailable):
        await sdk.call("Reward", room.address, "get_model", options=FEW)
    assert len(room.calls["GetModel"]) == 3


async def test_a_full_queue_is_asked_again_no_sooner_than_it_said(rooms, sdk):
    room = await rooms()
    room.failures["Status"].append(exhausted("the queue is full", retry_after_s=0.7))
    started = time.monotonic()
    await sdk.call("Trainer", room.address, "status")
    assert 0.7 <= time.monotonic() - started < 3
    assert len(room.calls["Status"]) == 2


async def test_exhausted_without_retry_info_is_never_tried_again(rooms, sdk):
    room = await rooms()
    room.failures["Status"].append(exhausted("out of memory", retry_after_s=None))
    with pytest.raises(ResourceExhausted) as caught:
        await sdk.call("Trainer", room.address, "status")
    assert caught.value.retry_after_s is None and len(room.calls["Status"]) == 1


async def test_other_errors_are_never_tried_again(rooms, sdk):
    room = await rooms()
    room.failures["Status"].append(precondition("no such thing"))
    with pytest.raises(FailedPrecondition):
        await sdk.call("Trainer", room.address, "status")
    assert len(room.calls["Status"]) == 1


async def test_no_wait_goes_past_the_deadline(rooms, sdk):
    room = await rooms()
    room.failures["Status"].append(unavailable("loading", retry_after_s=30.0))
    started = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        await sdk.call("Trainer", room.address, "status", timeout_s=1.0)
    assert caught.value.retry_after_s == 30.0
    assert time.monotonic() - started < 1.0


async def test_a_call_goes_to_another_address_where_one_is_down(rooms, sdk):
    room = await rooms()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        down = f"127.0.0.1:{unused.getsockname()[1]}"
        for _ in range(4):
            await sdk.call("Reward", [down, room.address], "get_model", options=ChannelOptions(retries=1))
    assert len(room.calls["GetModel"]) == 4


async def test_calls_alternate_between_addresses(rooms, ragged):
    first, second = await rooms(), await rooms()
    async with AsyncTrainerClient(f"{first.address},{second.address}") as client:
        for _ in range(6):
            await client.status()
    assert len(first.calls["Status"]) == len(second.calls["Status"]) == 3


async def test_a_server_that_comes_late_is_found(rooms, sdk):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{held.getsockname()[1]}"
    asking = asyncio.create_task(
        sdk.call("Reward", address, "get_model", options=ChannelOptions(timeout_s=20, retries=12))
    )
    await asyncio.sleep(1.5)
    await rooms(address=address)
    assert (await asking).tokenizer_digest == DIGEST


async def test_a_watch_that_broke_in_its_midst_says_so(rooms, sdk):
    room = await rooms()
    room.failures["Watch"].append(soon())
    room.failures["Watching"].append(soon())
    with pytest.raises(Unavailable):
        await sdk.call("Trainer", room.address, "watch")
    assert len(room.calls["Watch"]) == 2


async def test_generation_is_asked_again_for_what_is_missing_with_its_seeds(rooms, sdk):
    room = await rooms()
    room.break_after = 3
    seeds = [[10, 11], [20, 21], [30, 31]]
    sampling = Sampling(n=2)
    completions = await sdk.call("Generator", room.address, "generate", ["a", "b", "c"], sampling, seeds)
    got = {(c.prompt_index, c.sample_index): (c.text, c.seed, c.token_ids.tolist()) for c in completions}
    assert len(completions) == 6
    assert got == {(p, s): ("abc"[p], seeds[p][s], [seeds[p][s]]) for p in range(3) for s in range(2)}
    first, second = room.calls["Generate"]
    assert first.sampling.n == 2 and len(first.prompts) == 3
    # Samples 1 and 0 of c and 1 of b came before the break.
    assert second.sampling.n == 1
    assert [(prompt.text, list(prompt.seeds)) for prompt in second.prompts] == [("a", [10]), ("a", [11]), ("b", [20])]


async def test_generation_goes_on_at_another_address(rooms, sdk):
    rooms_open = [await rooms(), await rooms()]
    for room in rooms_open:
        room.break_after = 1
    completions = await sdk.call(
        "Generator", [room.address for room in rooms_open], "generate", [[i] for i in range(1, 9)], Sampling(seed=5)
    )
    assert sorted(c.prompt_index for c in completions) == list(range(8))
    assert all(c.prompt_token_ids.tolist() == [c.prompt_index + 1] for c in completions)


async def test_a_broken_generation_gets_the_completions_of_a_whole_one(rooms, sdk):
    room = await rooms()
    whole = await sdk.call("Generator", room.address, "generate", ["a", "b", "c"], Sampling(n=3, seed=1))
    room.break_after = 5
    broken = await sdk.call("Generator", room.address, "generate", ["a", "b", "c"], Sampling(n=3, seed=1))
    assert _by_index(broken) == _by_index(whole)


async def test_a_stream_that_ends_early_is_no_answer(rooms, sdk):
    room = await rooms()
    room.lose = 1
    with pytest.raises(Internal, match="1 completions missing"):
        await sdk.call("Generator", room.address, "generate", ["a", "b"])


async def test_a_broken_stream_that_had_sent_all_is_an_answer(rooms, sdk):
    room = await rooms()
    room.break_after = 2
    completions = await sdk.call("Generator", room.address, "generate", ["a", "b"])
    assert len(completions) == 2 and len(room.calls["Generate"]) == 1


async def test_generation_gives_up_where_nothing_comes(rooms, sdk):
    room = await rooms()
    room.failures["Generate"].extend(soon() for _ in range(9))
    with pytest.raises(Unavailable):
        await sdk.call("Generator", room.address, "generate", ["a"], options=FEW)
    assert len(room.calls["Generate"]) == 3


FORKING = """
import os, sys
from trimtab_client import ChannelOptions, RewardClient
client = RewardClient(sys.argv[1], ChannelOptions(timeout_s=10))
if sys.argv[2] == "used":
    client.get_model()
child = os.fork()
if child == 0:
    code = 1
    try:
        code = 0 if client.get_model().vocab_size == 100 else 2
    finally:
        os._exit(code)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
client.get_model()
sys.exit(status)
"""


@pytest.mark.parametrize("before", ["fresh", "used"])
async def test_a_client_works_in_a_forked_child(rooms, before):
    room = await rooms()
    command = [sys.executable, "-c", FORKING, room.address, before]
    environment = {**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "1"} if before == "used" else dict(os.environ)
    done = await asyncio.to_thread(
        subprocess.run, command, env=environment, capture_output=True, timeout=60, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(room.calls["GetModel"]) == (3 if before == "used" else 2)


def _by_index(completions):
    return {(c.prompt_index, c.sample_index): (c.seed, c.token_ids.tolist(), c.text) for c in completions}
