"""OpenAI's dialect, by OpenAI's own client library."""

import asyncio

import openai
import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
async def client(edge):
    async with openai.AsyncOpenAI(base_url=f"{edge.url}/v1", api_key="none", max_retries=0, timeout=30) as opened:
        yield opened


async def test_completions_of_several_prompts_come_with_usage_and_logprobs(client):
    answer = await client.completions.create(
        model="policy", prompt=["w1 w2", "w3"], max_tokens=5, n=2, seed=-3, logprobs=0
    )
    again = await client.completions.create(model="policy", prompt=["w1 w2", "w3"], max_tokens=5, n=2, seed=-3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [choice.text for choice in again.choices]
    assert answer.usage.prompt_tokens == 3 + 2
    sampled = sum(len(choice.logprobs.tokens) for choice in answer.choices)
    assert answer.usage.completion_tokens == sampled and answer.choices[0].logprobs.tokens[0].startswith("token_id:")
    assert answer.system_fingerprint
    last = answer.choices[3].text.split()[-1]
    stopped = await client.completions.create(
        model="policy", prompt=["w1 w2", "w3"], max_tokens=5, n=2, seed=-3, stop=last
    )
    assert last not in stopped.choices[3].text and answer.choices[3].text.startswith(stopped.choices[3].text)


async def test_completions_take_token_ids(client):
    one = await client.completions.create(model="policy", prompt=[0, 6, 7], max_tokens=3)
    two = await client.completions.create(model="policy", prompt=[[0, 6, 7], [0, 8]], max_tokens=3)
    assert len(one.choices) == 1 and one.usage.prompt_tokens == 3 and len(two.choices) == 2


async def test_a_streamed_completion_adds_up_to_the_whole_one(client):
    asked = {"model": "policy", "prompt": ["w1", "w2"], "max_tokens": 5, "seed": 4}
    whole = await client.completions.create(**asked)
    streamed = {0: "", 1: ""}
    usage = None
    async for chunk in await client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == {choice.index: choice.text for choice in whole.choices}
    assert usage == whole.usage


async def test_a_chat_is_answered_whole_and_streamed(client):
    asked = {"model": "policy", "messages": [{"role": "user", "content": "w1 w2"}], "max_tokens": 5, "seed": 4}
    whole = await client.chat.completions.create(**asked, logprobs=True)
    (choice,) = whole.choices
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    texts, ends, usage = [], [], None
    stream = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    async for chunk in stream:
        usage = chunk.usage or usage
        texts += [one.delta.content or "" for one in chunk.choices]
        ends += [one.finish_reason for one in chunk.choices if one.finish_reason]
    assert "".join(texts) == choice.message.content and ends == [choice.finish_reason] and usage == whole.usage


async def test_parts_of_a_message_are_one_text(client):
    parts = [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]
    asked = {"model": "policy", "max_completion_tokens": 4, "seed": 9}
    joined = await client.chat.completions.create(**asked, messages=[{"role": "user", "content": parts}])
    plain = await client.chat.completions.create(**asked, messages=[{"role": "user", "content": "w1 w2"}])
    assert joined.choices[0].message.content == plain.choices[0].message.content


async def test_models_are_listed_and_found_by_name(client):
    assert [model.id async for model in client.models.list()] == ["policy", "reward"]
    assert (await client.models.retrieve("policy")).id == "policy"


async def test_refusals_are_the_client_s_own_exceptions_and_name_the_parameter(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.completions.create(model="gpt-9", prompt="w1")
    assert unknown.value.param == "model" and unknown.value.code == "NOT_FOUND"
    with pytest.raises(openai.UnprocessableEntityError) as unsupported:
        await client.completions.create(model="policy", prompt="w1", presence_penalty=0.5)
    assert unsupported.value.param == "presence_penalty"
    with pytest.raises(openai.BadRequestError) as too_long:
        await client.completions.create(model="policy", prompt="w1 " * 200)
    assert too_long.value.param == "prompts[0].text"
    with pytest.raises(openai.BadRequestError):  # before the first event: a status, not half a stream
        await client.chat.completions.create(
            model="policy", messages=[{"role": "user", "content": "w1 " * 200}], stream=True
        )


async def test_the_blocking_client_works_too(edge):
    def ask() -> str:
        with openai.OpenAI(base_url=f"{edge.url}/v1", api_key="none", timeout=30) as client:
            return client.completions.create(model="policy", prompt="w1", max_tokens=2).object

    assert await asyncio.to_thread(ask) == "text_completion"
