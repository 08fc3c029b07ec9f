"""trimtab's own routes: what they answer is what the services answer."""

import asyncio
import json

import numpy as np
import pytest

from tests.services.gateway.conftest import gateway
from trimtab_client import AsyncRewardClient, RaggedTokens

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAIRS = [("w1 w2 w3", "w4 w5"), ("w1", "w9 w8 w7 w6")]


def as_items(pairs):
    return [{"prompt": prompt, "response": response} for prompt, response in pairs]


async def test_score_answers_what_the_reward_service_answers(edge, upstreams):
    async with AsyncRewardClient(upstreams["reward"]) as client:
        own = await client.score_texts(PAIRS)
    answer = await edge.http.post("/v1/score", json={"items": as_items(PAIRS)})
    body = answer.json()
    assert answer.status_code == 200
    np.testing.assert_allclose(body["scores"], own.scores, rtol=1e-6)
    np.testing.assert_allclose(body["normalized_scores"], own.normalized_scores, rtol=1e-6)
    assert body["version"]["name"] == own.version.name and body["truncated"] == []


async def test_score_takes_conversations_and_token_ids(edge, upstreams):
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    async with AsyncRewardClient(upstreams["reward"]) as client:
        digest = (await client.get_model()).tokenizer_digest
        own_chat = await client.score_chats([chat])
        own_ids = await client.score_tokens(RaggedTokens.from_sequences([[0, 7, 9]]), digest)
    by_chat = await edge.http.post("/v1/score", json={"conversations": [chat]})
    by_ids = await edge.http.post("/v1/score", json={"token_ids": [[0, 7, 9]], "tokenizer_digest": digest})
    np.testing.assert_allclose(by_chat.json()["scores"], own_chat.scores, rtol=1e-6)
    np.testing.assert_allclose(by_ids.json()["scores"], own_ids.scores, rtol=1e-6)


async def test_what_is_too_long_is_refused_by_field_or_cut_where_the_caller_says_so(edge):
    items = as_items([("w1", "w2"), ("w1", "w2 " * 100)])
    refused = await edge.http.post("/v1/score", json={"items": items})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "INVALID_ARGUMENT" and "items" in refused.json()["error"]["field"]
    cut = await edge.http.post("/v1/score", json={"items": items, "truncate": True})
    assert cut.status_code == 200 and cut.json()["truncated"] == [1]


async def test_generate_answers_in_order_and_the_same_for_the_same_seed(edge):
    sampling = {"n": 2, "max_tokens": 6, "seed": 7}
    body = {"prompts": ["w1 w2", [0, 5, 6], [{"role": "user", "content": "w3"}]], "sampling": sampling}
    first = (await edge.http.post("/v1/generate", json=body | {"return_tokens": True})).json()["completions"]
    again = (await edge.http.post("/v1/generate", json=body)).json()["completions"]
    assert [(one["prompt_index"], one["sample_index"]) for one in first] == [(p, s) for p in range(3) for s in range(2)]
    assert [one["text"] for one in first] == [one["text"] for one in again]
    assert all(len(one["token_ids"]) == len(one["logprobs"]) == one["token_count"] for one in first)
    assert again[0]["token_ids"] is None


async def test_a_stream_brings_each_completion_as_an_event_and_says_when_it_is_done(edge):
    body = {"prompts": ["w1", "w2"], "sampling": {"max_tokens": 4, "seed": 1}, "stream": True}
    async with edge.http.stream("POST", "/v1/generate", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in answer.aiter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event:")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data:")]
    assert names == ["completion", "completion", "done"]
    assert {one["prompt_index"] for one in data[:2]} == {0, 1}


async def test_a_stream_that_cannot_begin_is_refused_with_a_status(edge):
    body = {"prompts": [[0] * 100], "stream": True}
    answer = await edge.http.post("/v1/generate", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["field"] == "prompts[0].token_ids"


async def test_models_are_listed_with_what_they_serve(edge):
    listed = (await edge.http.get("/v1/models")).json()
    assert [(one["id"], one["task"]) for one in listed["data"]] == [("policy", "generate"), ("reward", "score")]
    assert listed["data"][1]["served"]["max_length"] == 64
    one = await edge.http.get("/v1/models/policy")
    assert one.json() == listed["data"][0]
    assert (await edge.http.get("/v1/models/other")).status_code == 404


async def test_a_service_that_is_down_is_503_and_listed_with_the_reason():
    async with gateway(reward="127.0.0.1:1", timeout_s=2) as alone:
        answer = await alone.http.post("/v1/score", json={"items": as_items(PAIRS)})
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "UNAVAILABLE"
        entry = (await alone.http.get("/v1/models")).json()["data"][0]
        assert entry["served"] is None and "UNAVAILABLE" in entry["reason"]
        no_generator = await alone.http.post("/v1/generate", json={"prompts": ["w1"]})
        assert no_generator.status_code == 404


async def test_a_request_id_comes_back_and_a_wrong_one_is_replaced(edge):
    given = await edge.http.get("/v1/models", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    fresh = await edge.http.get("/v1/models", headers={"x-request-id": "a b"})
    assert len(fresh.headers["x-request-id"]) == 32


async def test_a_body_beyond_the_limit_is_413_announced_or_not(upstreams):
    async with gateway(**upstreams, max_body_bytes=2048) as small:
        announced = await small.http.post("/v1/score", content=b" " * 4096)
        assert announced.status_code == 413 and announced.json()["error"]["field"] == "body"

        async def chunks():
            for _ in range(64):
                yield b" " * 1024

        chunked = await small.http.post("/v1/score", content=chunks())
        assert chunked.status_code == 413


async def test_a_body_that_does_not_come_is_408(upstreams):
    async with gateway(**upstreams, body_timeout_s=0.3) as impatient:
        host, port = impatient.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert (await asyncio.wait_for(reader.readline(), 10)).split()[1] == b"408"
        writer.close()


@pytest.mark.parametrize(
    "begun", [b"", b"POST /v1/score HTTP/1.1\r\nhost:", b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\nGET"]
)
async def test_a_caller_that_never_ends_its_head_is_hung_up_on(upstreams, begun):
    async with gateway(**upstreams, body_timeout_s=0.3) as impatient:
        host, port = impatient.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(begun)
        answered = await asyncio.wait_for(reader.read(), 10)
        assert answered.count(b"HTTP/1.1 200") == begun.count(b"healthz")
        writer.close()


async def test_a_connection_that_is_used_again_goes_on(upstreams):
    async with gateway(**upstreams, body_timeout_s=0.5) as impatient:
        for _ in range(4):
            assert (await impatient.http.get("/healthz")).status_code == 200
            await asyncio.sleep(0.3)
        body = {"prompts": ["w1"] * 16, "sampling": {"max_tokens": 60, "ignore_eos": True, "n": 8}}
        assert (await impatient.http.post("/v1/generate", json=body)).status_code == 200


async def test_a_caller_s_deadline_is_kept(edge, upstreams):
    wrong = await edge.http.get("/v1/models", headers={"x-timeout-s": "nan"})
    assert wrong.status_code == 422 and wrong.json()["error"]["field"] == "x-timeout-s"
    body = {"prompts": ["w1"] * 64, "sampling": {"max_tokens": 60, "ignore_eos": True, "n": 8}}
    late = await edge.http.post("/v1/generate", json=body, headers={"x-timeout-s": "0.05"})
    assert late.status_code == 504 and late.json()["error"]["code"] == "DEADLINE_EXCEEDED"


async def test_a_caller_that_asks_too_often_is_told_when_to_come_again(upstreams):
    async with gateway(**upstreams, requests_per_s=0.5, burst=3) as strict:
        statuses = [(await strict.http.get("/v1/models")).status_code for _ in range(3)]
        assert statuses == [200, 200, 200]
        refused = await strict.http.get("/v1/models")
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 2
        assert refused.json()["error"]["code"] == "RESOURCE_EXHAUSTED"
