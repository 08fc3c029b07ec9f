"""Batches beyond a server's limits: split over the addresses, answered as one."""

import asyncio
import time

import numpy as np
import pytest

from trimtab.runtime.errors import abort, invalid, precondition
from trimtab_client import (
    AsyncGeneratorClient,
    ChannelOptions,
    FailedPrecondition,
    GeneratorClient,
    InvalidArgument,
    ModelVersion,
    Sampling,
)

DIGEST = "blake3:tokenizer"


async def test_a_large_batch_is_split_over_two_addresses_and_put_together_in_order(rooms, sdk, ragged):
    opened = [await rooms(max_sequences=3), await rooms(max_sequences=3)]
    addresses = [room.address for room in opened]
    scores = await sdk.call("Reward", addresses, "score_tokens", ragged(11), DIGEST, truncate=True)
    assert scores.scores.tolist() == [i * i for i in range(1, 12)]
    assert scores.truncated == (0, 3, 6, 9)
    sizes = [len(call.tokens.tokens.lengths) for room in opened for call in room.calls["Score"]]
    assert sorted(sizes) == [2, 3, 3, 3] and all(len(room.calls["Score"]) == 2 for room in opened)


async def test_no_part_holds_more_tokens_than_a_request_may(rooms, sdk, ragged):
    room = await rooms(max_sequences=100, max_tokens=12)
    answer = await sdk.call("Reference", room.address, "logprobs", ragged(7), DIGEST, lse=True, hidden=True)
    assert [part.tolist() for part in answer.logprobs.split()] == [[-i] * (i - 1) for i in range(1, 8)]
    assert answer.lse.lengths.tolist() == list(range(7)) and answer.hidden.shape == (21, 2)
    assert answer.hidden[:, 0].tolist() == (-answer.logprobs.values).tolist()
    calls = room.calls["LogProbs"]
    assert len(calls) > 1 and all(sum(call.tokens.lengths) <= 12 for call in calls)


async def test_texts_are_split_so_that_their_tokens_cannot_exceed_the_limit(rooms, sdk):
    room = await rooms(max_tokens=300)
    pairs = [("p" * 20, "é" * (10 + i)) for i in range(10)]
    scores = await sdk.call("Reward", room.address, "score_texts", pairs)
    assert scores.scores.tolist() == [10 + i for i in range(10)]
    for call in room.calls["Score"]:
        assert sum(len((item.prompt + item.response).encode()) for item in call.texts.items) <= 300
    assert 1 < len(room.calls["Score"]) < 10


@pytest.mark.parametrize(
    ("client", "method", "bad"), [("Reward", "score_texts", ("a", "bad")), ("Generator", "generate", "bad")]
)
async def test_what_is_wrong_is_found_at_its_place_in_the_whole(rooms, sdk, client, method, bad):
    room = await rooms(max_sequences=3)
    enter = room.enter

    async def refusing(method, request, context):
        await enter(method, request, context)
        if method == "Score":
            found = [
                f"texts.items[{i}].response" for i, item in enumerate(request.texts.items) if item.response == "bad"
            ]
        else:
            found = [
                f"prompts[{i}].text" for i, prompt in enumerate(getattr(request, "prompts", ())) if prompt.text == "bad"
            ]
        if found:
            await abort(context, invalid(found[0], "is bad"))

    room.enter = refusing
    rows = [("a", "good") if client == "Reward" else "good"] * 10
    rows[7] = bad
    with pytest.raises(InvalidArgument) as refused:
        await sdk.call(client, room.address, method, rows)
    wanted = "texts.items[7].response" if client == "Reward" else "prompts[7].text"
    assert refused.value.field == wanted and refused.value.message == f"{wanted}: is bad"


async def test_chats_are_split_by_the_number_of_sequences(rooms, sdk):
    room = await rooms(max_sequences=4)
    chats = [[{"role": "user", "content": "x"}] * (1 + i % 3) for i in range(9)]
    scores = await sdk.call("Reward", room.address, "score_chats", chats)
    assert scores.scores.tolist() == [1 + i % 3 for i in range(9)]
    assert sorted(len(call.conversations.conversations) for call in room.calls["Score"]) == [1, 4, 4]


async def test_a_batch_is_never_answered_by_two_versions(rooms, sdk, ragged):
    older, newer = await rooms(max_sequences=2), await rooms(max_sequences=2)
    newer.version = ModelVersion("run", "policy", 8, "blake3:bb")
    scores = await sdk.call("Reward", [older.address, newer.address], "score_tokens", ragged(6), DIGEST)
    assert scores.version == newer.version
    assert scores.scores.tolist() == [1, 4, 9, 16, 25, 36]
    again = [c for room in (older, newer) for c in room.calls["Score"] if c.version.HasField("exact")]
    assert again and all(ModelVersion.from_proto(c.version.exact) == newer.version for c in again)


async def test_the_first_failure_of_a_part_ends_the_batch(rooms, sdk, ragged):
    slow, broken = await rooms(max_sequences=2), await rooms(max_sequences=2)
    slow.score_delay_s = 30.0
    broken.failures["Score"].extend(precondition("foreign tokenizer") for _ in range(4))
    started = time.monotonic()
    with pytest.raises(FailedPrecondition):
        await sdk.call(
            "Reward",
            [slow.address, broken.address],
            "score_tokens",
            ragged(8),
            DIGEST,
            options=ChannelOptions(timeout_s=40),
        )
    assert time.monotonic() - started < 10


async def test_one_deadline_holds_for_all_parts(rooms, sdk, ragged):
    room = await rooms(max_sequences=1)
    room.delay_s = 0.4
    started = time.monotonic()
    with pytest.raises(Exception, match="DEADLINE_EXCEEDED"):
        await sdk.call("Reward", room.address, "score_tokens", ragged(12), DIGEST, timeout_s=1.0)
    assert time.monotonic() - started < 2.5


async def test_an_empty_batch_is_the_servers_to_refuse(rooms, sdk, ragged):
    room = await rooms(max_sequences=3)
    await sdk.call("Reward", room.address, "score_tokens", ragged(0), DIGEST)
    assert len(room.calls["Score"]) == 1 and not room.calls["Score"][0].tokens.tokens.lengths


async def test_prompts_of_a_generation_are_shared_by_the_addresses(rooms, sdk):
    opened = [await rooms(), await rooms()]
    prompts = ["text", [1, 2, 3], np.array([4, 5], np.int32), [{"role": "user", "content": "chat"}]]
    completions = await sdk.call(
        "Generator", [room.address for room in opened], "generate", prompts, Sampling(n=2, max_tokens=7)
    )
    assert sorted((c.prompt_index, c.sample_index) for c in completions) == [(p, s) for p in range(4) for s in (0, 1)]
    by_prompt = {c.prompt_index: c for c in completions}
    assert (by_prompt[0].text, by_prompt[3].text) == ("text", "chat")
    assert by_prompt[1].prompt_token_ids.tolist() == [1, 2, 3] and by_prompt[2].prompt_token_ids.tolist() == [4, 5]
    for room in opened:
        (call,) = room.calls["Generate"]
        assert len(call.prompts) == 2 and call.sampling.n == 2 and call.sampling.max_tokens == 7
    completion = by_prompt[1]
    assert completion.finish_reason == "stop" and completion.logprobs.tolist() == [-0.5]
    assert [(run.version, run.token_count) for run in completion.versions] == [(opened[0].version, 1)]


async def test_a_name_of_dns_gets_work_for_several_replicas(rooms, sdk):
    room = await rooms()
    name = f"dns:///localhost:{room.address.rpartition(':')[2]}"
    completions = await sdk.call("Generator", name, "generate", [f"text {i}" for i in range(8)], Sampling(n=1))
    assert sorted(c.prompt_index for c in completions) == list(range(8))
    assert [len(call.prompts) for call in room.calls["Generate"]] == [2, 2, 2, 2]


async def test_a_generation_beyond_the_limits_is_split(rooms, sdk):
    room = await rooms(max_sequences=4)
    completions = await sdk.call("Generator", room.address, "generate", ["a", "b", "c"], Sampling(n=6, seed=3))
    assert sorted((c.prompt_index, c.sample_index) for c in completions) == [(p, s) for p in range(3) for s in range(6)]
    assert len({c.seed for c in completions}) == 18
    assert all(len(c.prompts) * c.sampling.n <= 4 for c in room.calls["Generate"])


async def test_a_seed_gives_the_same_completions_whole_or_split(rooms, sdk):
    whole, *parts = [await rooms(), await rooms(max_sequences=3), await rooms(max_sequences=3)]
    arguments = (["a", "b", "c"], Sampling(n=5, seed=9))
    first = await sdk.call("Generator", whole.address, "generate", *arguments)
    second = await sdk.call("Generator", [room.address for room in parts], "generate", *arguments)
    assert {(c.prompt_index, c.sample_index): c.seed for c in first} == {
        (c.prompt_index, c.sample_index): c.seed for c in second
    }


async def test_seeds_that_do_not_fit_are_refused_before_they_leave(rooms, sdk):
    room = await rooms()
    for seeds in ([[1]], [[1, 2], [3]], [[1, -1], [2, 3]]):
        with pytest.raises(ValueError, match="seed"):
            await sdk.call("Generator", room.address, "generate", ["a", "b"], Sampling(n=2), seeds)
    assert not room.calls["Generate"]


@pytest.mark.parametrize("addresses", [1, 2])
async def test_completions_come_as_they_finish_and_leaving_early_ends_the_call(rooms, addresses):
    opened = [await rooms() for _ in range(addresses)]
    slow = opened[-1]
    slow.pause_between_s = 30.0
    async with AsyncGeneratorClient([room.address for room in opened]) as client:
        stream = client.generate(["a", "b", "c", "d"])
        for _ in range(2 * addresses - 1):
            await asyncio.wait_for(anext(stream), 5)
        await stream.aclose()
        await asyncio.wait_for(slow.cancelled.wait(), 5)


@pytest.mark.parametrize("addresses", [1, 2])
async def test_leaving_a_blocking_stream_early_ends_the_call(rooms, addresses):
    opened = [await rooms() for _ in range(addresses)]
    slow = opened[-1]
    slow.pause_between_s = 30.0

    def leave_early() -> None:
        with GeneratorClient([room.address for room in opened]) as client:
            stream = client.generate(["a", "b", "c", "d"])
            for _ in range(2 * addresses - 1):
                next(stream)
            stream.close()

    await asyncio.wait_for(asyncio.to_thread(leave_early), 10)
    await asyncio.wait_for(slow.cancelled.wait(), 5)
