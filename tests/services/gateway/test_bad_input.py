"""Thousands of mutated bodies at every route: each refusal is typed and names a field, and the gateway stands it."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import httpx2
import pytest

from tests.services.gateway.mutations import mutated

pytestmark = pytest.mark.asyncio(loop_scope="module")

SAMPLING = {"n": 1, "max_tokens": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "stop": ["w9"], "seed": 3}
CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
BODIES = [
    ("/v1/score", {"items": [{"prompt": "w1", "response": "w2"}], "truncate": False, "model": "reward"}),
    ("/v1/score", {"conversations": [CHAT], "version": {"step": 0}}),
    ("/v1/score", {"token_ids": [[0, 5, 6], [0, 7]], "tokenizer_digest": "blake3:00"}),
    ("/v1/generate", {"prompts": ["w1", [0, 5], CHAT[:1]], "sampling": SAMPLING, "return_tokens": True}),
    ("/v1/generate", {"prompts": ["w1"], "sampling": SAMPLING, "stream": True}),
    ("/v1/completions", {"model": "policy", "prompt": ["w1", "w2"], "max_tokens": 2, "temperature": 0.5, "stop": "w9"}),
    ("/v1/completions", {"model": "policy", "prompt": [[0, 5]], "max_tokens": 2, "n": 1, "logprobs": 0}),
    ("/v1/chat/completions", {"model": "policy", "messages": CHAT[:1], "max_tokens": 2, "seed": 1, "stream": True}),
    ("/classify", {"model": "reward", "input": ["w1 w2", "w3"], "use_activation": False}),
    ("/get_reward", {"query": ["w1 w2"], "prompts": ["w1"], "labels": ["x"]}),
]


Post = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]
"""Sends a JSON body to a path; the status and the body of the answer."""


async def refusals_of(post: Post, count: int, seed: int) -> Counter[str]:
    """Send so many; what came back, by kind and status. Fails at the first answer that is no answer."""
    random_ = random.Random(seed)
    seen: Counter[str] = Counter()
    at_once = asyncio.Semaphore(16)

    async def one(path: str, content: bytes, kind: str) -> None:
        async with at_once:
            status, answer = await post(path, content)
        told = f"{path} {kind} {content[:300]!r} → {status} {answer[:300]!r}"
        if status == 503:  # a service that follows versions waits for one that may still come
            assert b'"version"' in content and json.loads(answer)["error"]["code"] == "UNAVAILABLE", told
            return
        assert status in (200, 400, 404, 422), told
        if status != 200:
            error = json.loads(answer)["error"]
            assert error["code"] in ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND"), told
            assert error["field"] and error["message"], told
        seen[f"{kind} {status}"] += 1

    tasks = []
    for _ in range(count):
        path, body = random_.choice(BODIES)
        content, kind = mutated(body, random_)
        tasks.append(asyncio.create_task(one(path, content, kind)))
        if len(tasks) >= 500:
            await asyncio.gather(*tasks)
            tasks.clear()
    await asyncio.gather(*tasks)
    return seen


async def test_every_mutated_body_is_answered_or_refused_by_field(edge):
    async def post(path: str, content: bytes) -> tuple[int, bytes]:
        answer = await edge.http.post(path, content=content, headers={"content-type": "application/json"})
        return answer.status_code, answer.content

    seen = await refusals_of(post, 1500, seed=1)
    assert sum(count for kind, count in seen.items() if not kind.endswith("200")) > 750
    assert {kind.split()[0] for kind in seen} >= {"value", "drop", "add", "bytes", "cut", "utf8", "depth"}
    assert (await edge.http.get("/healthz")).status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_a_body_that_is_not_called_json_is_415(edge, content_type):
    answer = await edge.http.post("/v1/score", content=b"{}", headers={"content-type": content_type})
    assert answer.status_code == 415 and answer.json()["error"]["field"] == "content-type"


async def test_a_caller_that_hangs_up_ends_the_work_behind_the_gateway(edge):
    body = {"prompts": ["w1"] * 200, "sampling": {"max_tokens": 60, "ignore_eos": True, "n": 8}}
    with pytest.raises(httpx2.ReadTimeout):
        await edge.http.post("/v1/generate", json=body, timeout=httpx2.Timeout(10, read=0.2))
    quick = {"prompts": ["w1"], "sampling": {"max_tokens": 1}}
    assert (await edge.http.post("/v1/generate", json=quick, timeout=5)).status_code == 200
