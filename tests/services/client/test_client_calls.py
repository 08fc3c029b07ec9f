"""Every call of the SDK against a real server, blocking and asyncio."""

import asyncio
import time

import numpy as np
import pytest

from trimtab.runtime.errors import invalid
from trimtab_client import (
    AsyncRewardClient,
    AtLeast,
    Cancelled,
    ChannelOptions,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    ModelVersion,
    RaggedError,
    RewardClient,
    RunStatus,
    StepMetrics,
)
from trimtab_client.v1 import trainer_pb2

DIGEST = "blake3:tokenizer"


async def test_get_model_tells_what_is_served(rooms, sdk):
    room = await rooms(max_sequences=4, max_tokens=100)
    info = await sdk.call("Reward", room.address, "get_model")
    assert info.version == room.version and info.tokenizer_digest == DIGEST
    assert (info.max_sequences, info.max_tokens, info.eos_token_ids) == (4, 100, (2,))


async def test_load_version_reaches_every_address(rooms, sdk):
    first, second = await rooms(), await rooms()
    wanted = ModelVersion("run", "policy", 8, "blake3:bb")
    info = await sdk.call("Generator", [first.address, second.address], "load_version", wanted)
    assert info.version == first.version == second.version == wanted


async def test_scores_come_back_in_the_order_of_the_batch(rooms, sdk, ragged):
    room = await rooms()
    scores = await sdk.call("Reward", room.address, "score_tokens", ragged(5), DIGEST, version=AtLeast(3))
    assert scores.scores.dtype == np.float32 and scores.scores.tolist() == [1, 4, 9, 16, 25]
    assert scores.normalized_scores.tolist() == [2, 5, 10, 17, 26]
    assert scores.version == room.version and scores.truncated == ()
    (request,) = room.calls["Score"]
    assert request.tokens.tokenizer_digest == DIGEST and request.version.at_least_step == 3


async def test_texts_and_chats_are_scored(rooms, sdk):
    room = await rooms()
    scores = await sdk.call("Reward", room.address, "score_texts", [("a", "four"), ("b", "ünï")], truncate=True)
    assert scores.scores.tolist() == [4, 3] and scores.truncated == (0,)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    scores = await sdk.call("Reward", room.address, "score_chats", [chat, chat[:1]])
    assert scores.scores.tolist() == [2, 1]


async def test_a_chat_message_without_content_is_refused_before_it_leaves(rooms, sdk):
    room = await rooms()
    with pytest.raises(ValueError, match="role and content"):
        await sdk.call("Reward", room.address, "score_chats", [[{"role": "user"}]])
    assert not room.calls["Score"]


async def test_logprobs_of_response_tokens_with_all_that_was_asked_for(rooms, sdk, ragged):
    room = await rooms()
    answer = await sdk.call(
        "Reference", room.address, "logprobs", ragged(3), DIGEST, 0.5, lse=True, entropy=True, hidden=True
    )
    assert [part.tolist() for part in answer.logprobs.split()] == [[], [-2], [-3, -3]]
    assert answer.lse.values.tolist() == [-4, -6, -6] and answer.entropy.values.tolist() == [-6, -9, -9]
    assert answer.hidden.dtype == np.uint16 and answer.hidden.tolist() == [[2, 2], [3, 3], [3, 3]]
    assert room.calls["LogProbs"][0].temperature == 0.5
    bare = await sdk.call("Reference", room.address, "logprobs", ragged(3), DIGEST)
    assert bare.lse is None and bare.entropy is None and bare.hidden is None


async def test_logprobs_without_prompt_lengths_are_refused_before_they_leave(rooms, sdk, ragged):
    room = await rooms()
    tokens = type(ragged(2))(ragged(2).token_ids, ragged(2).lengths)
    with pytest.raises(RaggedError) as caught:
        await sdk.call("Reference", room.address, "logprobs", tokens, DIGEST)
    assert caught.value.field == "prompt_lengths" and not room.calls["LogProbs"]


async def test_a_trainer_is_controlled_and_watched(rooms, sdk):
    room = await rooms()
    config = trainer_pb2.SftConfig(data="d", epochs=2)
    started = await sdk.call("Trainer", room.address, "start", "mine", config)
    assert started.run_id == "mine" and started.state == "running" and not started.finished
    assert room.calls["Start"][0].sft == config
    assert (await sdk.call("Trainer", room.address, "status")).published == (room.version,)
    assert (await sdk.call("Trainer", room.address, "pause", "r")).state == "paused"
    assert (await sdk.call("Trainer", room.address, "resume", "r")).state == "running"
    assert await sdk.call("Trainer", room.address, "checkpoint", "r") == (room.version,)
    assert (await sdk.call("Trainer", room.address, "stop", "r")).finished
    events = await sdk.call("Trainer", room.address, "watch", "r", after_step=1)
    assert [event.step for event in events if isinstance(event, StepMetrics)] == [2, 3]
    assert events[0].values == {"loss": 0.5}
    assert isinstance(events[-1], RunStatus) and events[-1].state == "succeeded"


async def test_start_refuses_what_is_no_stage_config(rooms, sdk):
    room = await rooms()
    with pytest.raises(ValueError, match="SftConfig"):
        await sdk.call("Trainer", room.address, "start", "mine", trainer_pb2.StageConfig())


async def test_an_invalid_request_names_its_field(rooms, sdk, ragged):
    room = await rooms()
    room.failures["Score"].append(invalid("tokens.lengths", "sequence 1 has no tokens"))
    with pytest.raises(InvalidArgument, match="no tokens") as caught:
        await sdk.call("Reward", room.address, "score_tokens", ragged(2), DIGEST)
    assert caught.value.field == "tokens.lengths" and caught.value.code == "INVALID_ARGUMENT"
    assert len(room.calls["Score"]) == 1


async def test_an_answer_of_the_wrong_size_is_no_answer(rooms, sdk, ragged):
    room = await rooms()
    room.lose = 1
    with pytest.raises(Internal, match="2 scores and 2 normalised for 3 sequences"):
        await sdk.call("Reward", room.address, "score_tokens", ragged(3), DIGEST)


@pytest.mark.parametrize("wanted", [{}, {"entropy": True}, {"hidden": True}])
async def test_logprobs_of_other_lengths_are_no_answer(rooms, sdk, ragged, wanted):
    room = await rooms()
    room.lose = 1
    with pytest.raises(Internal, match="contradicts itself"):
        await sdk.call("Reference", room.address, "logprobs", ragged(3), DIGEST, **wanted)


async def test_closing_a_client_cancels_what_is_in_flight(rooms, ragged):
    room = await rooms()
    room.score_delay_s = 30.0
    asyncio_client, blocking_client = AsyncRewardClient(room.address), RewardClient(room.address)
    calls = [
        asyncio.create_task(asyncio_client.score_tokens(ragged(2), DIGEST)),
        asyncio.create_task(asyncio.to_thread(blocking_client.score_tokens, ragged(2), DIGEST)),
    ]
    async with asyncio.timeout(10):
        while len(room.calls["Score"]) < 2:  # noqa: ASYNC110 (two calls, one event)
            await asyncio.sleep(0.01)
        await asyncio_client.close()
        blocking_client.close()
        for call in calls:
            with pytest.raises(Cancelled):
                await call


async def test_every_call_has_a_deadline(rooms, sdk, ragged):
    room = await rooms()
    tokens, options = ragged(2), ChannelOptions(timeout_s=5)
    await sdk.call("Reward", room.address, "score_tokens", tokens, DIGEST, options=options)
    await sdk.call("Generator", room.address, "generate", ["a"], options=options)
    await sdk.call("Trainer", room.address, "status", options=options)
    assert room.deadlines_s and all(left is not None and 0 < left <= 5.1 for left in room.deadlines_s)
    await sdk.call("Trainer", room.address, "watch")
    assert room.deadlines_s[-1] is not None


async def test_a_late_answer_is_deadline_exceeded(rooms, sdk, ragged):
    room = await rooms()
    room.delay_s = 5.0
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await sdk.call("Reward", room.address, "score_tokens", ragged(2), DIGEST, timeout_s=0.3)
    assert time.monotonic() - started < 2


async def test_a_cancelled_task_cancels_its_call(rooms, ragged):
    room = await rooms()
    async with AsyncRewardClient(room.address) as client:
        await client.get_model()
        room.delay_s = 30.0
        room.entered.clear()
        task = asyncio.create_task(client.score_tokens(ragged(2), DIGEST))
        await asyncio.wait_for(room.entered.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(room.cancelled.wait(), 5)


async def test_a_closed_client_says_so(rooms):
    room = await rooms()
    client = RewardClient(room.address)
    client.close()
    with pytest.raises(ValueError, match="closed"):
        client.get_model()


async def test_one_asyncio_client_serves_one_event_loop_after_another(rooms):
    room = await rooms()
    client = AsyncRewardClient(room.address)

    def twice() -> list[ModelVersion]:
        return [asyncio.run(client.get_model()).version for _ in range(2)]

    assert await asyncio.to_thread(twice) == [room.version] * 2
