"""Several scorers in one reward server: models, rules in processes of their own, weighted sums of both."""

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest
from grpc import StatusCode
from transformers import AutoTokenizer

from tests.services.reward_room import Peer, children_that_run, field_of, refusal, serving
from trimtab.runtime.errors import StartError
from trimtab.weights.store import open_store
from trimtab_client import AsyncRewardClient, ModelVersion, RaggedTokens
from trimtab_client.ragged import decode_floats
from trimtab_client.v1 import model_pb2, reward_pb2, tokens_pb2

FUNCTIONS = """
import os, re, time
def fine(response):
    print("what a function prints is no answer")
    return len(response)
def slow(response):
    time.sleep(60 if "sleep" in response else 0)
    return 1
def fails(response):
    if "bad" in response:
        raise RuntimeError("this one is bad")
    return float("nan") if "nan" in response else 2
def dies(response):
    if "die" in response:
        os._exit(7)
    return 3
"""


@pytest.fixture(scope="module")
def folders(make_tiny) -> tuple[Path, Path]:
    return make_tiny("reward", seed=1, trimtab_score_mean=0.25, trimtab_score_std=0.5), make_tiny("reward", seed=2)


@pytest.fixture
def function(tmp_path):
    (tmp_path / "functions_of_tests.py").write_text(FUNCTIONS)

    def settings(name: str, **more) -> dict:
        return {"kind": "function", "function": f"functions_of_tests:{name}", "folder": str(tmp_path), **more}

    return settings


def texts(*responses: str, prompt: str = "w1", reference: str = "") -> reward_pb2.TextBatch:
    pairs = [reward_pb2.TextPair(prompt=prompt, response=text, reference=reference) for text in responses]
    return reward_pb2.TextBatch(items=pairs)


async def scores(peer: Peer, scorer: str, *responses: str, **more) -> list[float]:
    return decode_floats((await peer.send(texts=texts(*responses, **more), scorer=scorer)).scores).tolist()


async def test_a_sum_adds_weighted_normalised_scores_and_shows_its_parts(folders):
    scorers = {
        "first": {"kind": "model", "model": str(folders[0])},
        "second": {"kind": "model", "model": str(folders[1])},
        "words": {"kind": "length"},
        "sum": {"kind": "sum", "weights": {"first": 1.5, "second": -1.0, "words": 0.25}},
        "raw": {"kind": "sum", "of": "raw", "weights": {"first": 1.0}},
    }
    async with serving(None, scorers=scorers, default="sum") as peer:
        batch = texts(" w3 w4", " w5 w6 w7")
        first = await peer.send(texts=batch, scorer="first")
        second = await peer.send(texts=batch, scorer="second")
        total = await peer.send(texts=batch)
        raw = await peer.send(texts=batch, scorer="raw")
        listed = {scorer.name: scorer for scorer in (await peer.info()).scorers}
    want = 1.5 * decode_floats(first.normalized_scores) - decode_floats(second.scores) + 0.25 * np.array([2, 3])
    np.testing.assert_allclose(decode_floats(total.scores), want, atol=1e-5)
    assert total.scores == total.normalized_scores
    assert total.scorer == "sum"
    assert [(part.scorer, part.weight) for part in total.parts] == [("first", 1.5), ("second", -1.0), ("words", 0.25)]
    assert total.parts[0].scores == first.normalized_scores
    assert total.parts[0].version == first.version
    assert raw.scores == first.scores
    assert first.scores != second.scores
    assert next(iter(listed)) == "sum", "the default one is the first"
    assert dict(listed["sum"].weights) == {"first": 1.5, "second": -1.0, "words": 0.25}
    assert listed["sum"].version == total.version
    assert listed["sum"].tokenizer_digest == listed["first"].tokenizer_digest
    assert (listed["words"].kind, listed["first"].max_length) == ("length", 64)


async def test_rules_read_texts_conversations_and_tokens_alike(folders):
    scorers = {"words": {"kind": "length"}, "starts": {"kind": "regex", "pattern": "^w3"}}
    async with serving(folders[0], scorers=scorers, default="model") as peer:
        tokenizer = AutoTokenizer.from_pretrained(folders[0])
        ids = tokenizer.encode("w1 w2 w3 w4 w5")
        tokens = RaggedTokens.from_sequences([ids], prompt_lengths=[3]).to_proto()
        batch = reward_pb2.TokenBatch(tokens=tokens, tokenizer_digest=(await peer.info()).tokenizer_digest)
        messages = [
            tokens_pb2.ChatMessage(role="user", content="w1 w2"),
            tokens_pb2.ChatMessage(role="assistant", content="w3 w4 w5"),
        ]
        chat = reward_pb2.ConversationBatch(conversations=[tokens_pb2.Conversation(messages=messages)])
        for scorer, want in (("words", 3), ("starts", 1)):
            for fields in ({"texts": texts("w3 w4 w5", prompt="w1 w2")}, {"conversations": chat}):
                assert decode_floats((await peer.send(scorer=scorer, **fields)).scores).tolist() == [want], fields
        assert decode_floats((await peer.send(scorer="words", tokens=batch)).scores).tolist() == [3]
        foreign = reward_pb2.TokenBatch(tokens=tokens, tokenizer_digest="blake3:other")
        error = await refusal(peer.send(scorer="words", tokens=foreign))
        assert error.code() == StatusCode.FAILED_PRECONDITION
        assert "send text" in (error.details() or "")


async def test_a_verifier_compares_with_the_reference_and_wants_one():
    async with serving(None, scorers={"exact": {"kind": "answer"}}) as peer:
        assert await scores(peer, "exact", "it is 42", "it is 41", reference="42") == [1, 0]
        error = await refusal(scores(peer, "exact", "it is 42"))
        assert (error.code(), field_of(error)) == (StatusCode.INVALID_ARGUMENT, "texts.items[0].reference")
        assert (await peer.info()).scorers[0].needs_reference
        async with AsyncRewardClient(peer.server.address) as client:
            found = await client.score_texts([("q", "7"), ("q", "8")], references=["7", "7"])
            chats = await client.score_chats([[{"role": "assistant", "content": "7"}]], references=["7"])
        assert found.scores.tolist() == [1, 0]
        assert chats.scores.tolist() == [1]


async def test_only_the_response_at_fault_fails_and_the_rule_goes_on(function):
    scorers = {"dies": function("dies"), "fails": function("fails"), "fine": function("fine")}
    async with serving(None, scorers=scorers, default="fine") as peer:
        calls = [scores(peer, "dies", text) for text in ("a", "die", "b", "c")]
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [found[0], found[2], found[3]] == [[3], [3], [3]]
        assert (found[1].code(), "exit code 7" in found[1].details()) == (StatusCode.INTERNAL, True)
        bad = await refusal(scores(peer, "fails", "bad"))
        assert bad.code() == StatusCode.INTERNAL
        assert "this one is bad" in (bad.details() or "")
        assert "no finite number" in ((await refusal(scores(peer, "fails", "nan"))).details() or "")
        assert await scores(peer, "fails", "good") == [2]
        assert await scores(peer, "fine", "abc") == [3]


async def test_a_hanging_rule_holds_up_nobody_and_is_ended(folders, function):
    scorers = {
        "backtracks": {"kind": "regex", "pattern": r"(a+)+$", "timeout_s": 0.5},
        "slow": function("slow", timeout_s=0.5),
        "words": {"kind": "length", "timeout_s": 10},
        "sum": {"kind": "sum", "weights": {"words": 1, "backtracks": 1}},
    }
    async with serving(folders[0], scorers=scorers, default="model") as peer:
        endless = asyncio.create_task(refusal(scores(peer, "backtracks", "a" * 40 + "!")))
        asleep = asyncio.create_task(refusal(scores(peer, "slow", "sleep")))
        part = asyncio.create_task(refusal(scores(peer, "sum", "a" * 40 + "!")))
        behind = asyncio.create_task(scores(peer, "backtracks", "aaa"))
        await asyncio.sleep(0.05)
        answered = 0
        while not endless.done():
            await asyncio.gather(scores(peer, "model", " w3"), scores(peer, "words", "a b"))
            answered += 1
        assert answered > 3, "models and other rules answered meanwhile"
        for error in (await endless, await asleep, await part):
            assert error.code() == StatusCode.DEADLINE_EXCEEDED
            assert "took longer than 0.5 s" in (error.details() or "")
        assert await behind == [1], "what stood behind it is scored by a new process"
        assert await scores(peer, "slow", "awake") == [1]


async def test_a_stuck_model_times_out_alone(folders):
    scorers = {
        "stuck": {"kind": "model", "model": str(folders[0]), "timeout_s": 0.5},
        "other": {"kind": "model", "model": str(folders[1])},
    }
    async with serving(None, scorers=scorers, default="stuck") as peer:
        blocked = asyncio.create_task(peer.server.context.worker.run(time.sleep, 1.5))
        waiting = asyncio.create_task(refusal(scores(peer, "stuck", "w3")))
        assert len(await scores(peer, "other", "w3")) == 1
        assert not blocked.done(), "the other model has a thread of its own"
        assert (await waiting).code() == StatusCode.DEADLINE_EXCEEDED
        await blocked
        assert len(await scores(peer, "stuck", "w3")) == 1


async def test_a_rules_queue_is_bounded(function):
    scorers = {"slow": function("slow", timeout_s=0.3, queue_limit=4)}
    async with serving(None, scorers=scorers) as peer:
        calls = [asyncio.create_task(refusal(scores(peer, "slow", "sleep"))) for _ in range(12)]
        codes = [(await call).code() for call in calls]
    assert codes.count(StatusCode.RESOURCE_EXHAUSTED) >= 4
    assert set(codes) == {StatusCode.RESOURCE_EXHAUSTED, StatusCode.DEADLINE_EXCEEDED}


async def test_pins_name_a_models_version_and_what_a_sum_is_made_of(folders, tmp_path):
    store = open_store(str(tmp_path / "store"))
    first, second = (
        store.publish(folder, run_id="rm", name="reward", step=step).version for step, folder in enumerate(folders, 1)
    )
    scorers = {
        "words": {"kind": "length"},
        "served": {"kind": "model", "model": "version:rm/reward@1"},
        "sum": {"kind": "sum", "weights": {"served": 1.0, "words": 1.0}},
    }
    async with serving(None, scorers=scorers, default="words", store=str(tmp_path / "store")) as peer:
        async with AsyncRewardClient(peer.server.address) as client:
            before = await client.score_texts([("w1", "w2")], scorer="sum")
            again = await client.score_texts([("w1", "w2")], before.version, scorer="sum")
            assert again.scores.tolist() == before.scores.tolist()
            await client.load_version(second, scorer="served")
            after = await client.score_texts([("w1", "w2")], scorer="sum")
        assert (before.parts[0].version.step, after.parts[0].version.step) == (1, 2)
        assert before.version.digest != after.version.digest
        for scorer, pin in (("sum", before.version), ("served", first), ("words", ModelVersion("", "words", 0, "x"))):
            error = await refusal(
                peer.send(texts=texts("w3"), scorer=scorer, version=model_pb2.VersionPin(exact=pin.to_proto()))
            )
            assert error.code() == StatusCode.FAILED_PRECONDITION, scorer
        moved = await refusal(peer.load(first.to_proto()))
        assert (moved.code(), field_of(moved)) == (StatusCode.FAILED_PRECONDITION, "scorer")
        unknown = await refusal(scores(peer, "nobody", "w3"))
        assert (unknown.code(), field_of(unknown)) == (StatusCode.NOT_FOUND, "scorer")
        assert "words, served, sum" in (unknown.details() or "")


async def test_a_rule_that_cannot_be_made_stops_the_start(function, tmp_path):
    for settings, reason in (
        (function("absent"), "scorers.mine: .*absent"),
        ({"kind": "function", "function": "no_such_module_here:f"}, "scorers.mine: ModuleNotFoundError"),
    ):
        with pytest.raises(StartError, match=reason):
            async with serving(None, scorers={"mine": settings}):
                pytest.fail("it was served")


async def test_no_process_of_a_rule_outlives_its_server(function):
    scorers = {"fine": function("fine", processes=2)}
    async with serving(None, scorers=scorers) as peer:
        await scores(peer, "fine", "abc")
        assert len(children_that_run("trimtab.reward.rule_process")) == 2
    assert not children_that_run("trimtab.reward.rule_process")
