"""OpenAI's `/v1/completions` over the generator, streamed or not.

The generator sends a completion when it is finished, so a stream brings each choice whole, as one chunk.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from trimtab.gateway.dialects.openai_sampling import (
    SamplingFields,
    Usage,
    UsageCount,
    fingerprint,
    token_names,
)
from trimtab.gateway.events import STREAMED, event, streaming
from trimtab.gateway.guard import Visit, visit_of
from trimtab.gateway.json_bodies import JsonRoute
from trimtab.gateway.problems import POSTED, documented, refused
from trimtab.gateway.room import room_of
from trimtab.gateway.schemas import Text, TokenIds
from trimtab_client import Completion
from trimtab_client.conversations import Prompt

router = APIRouter(route_class=JsonRoute, tags=["dialects"])


def _kind(value: object) -> str:
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(value, str):
        return "<text>"
    return "<texts>" if isinstance(first, str) else "<id lists>" if isinstance(first, list) else "<ids>"


Prompts = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("<id lists>")],
    Discriminator(_kind),
]


class CompletionBody(SamplingFields):
    """One prompt or several, as text or token ids."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "policy", "prompt": "Once upon a time", "max_tokens": 32, "seed": 1}]}
    )

    prompt: Prompts
    logprobs: Literal[0] | None = Field(default=None, description="0: the sampled tokens' own, of logits/temperature.")
    best_of: int | None = Field(default=None, ge=1, le=4096, description="Only as many as n.")
    echo: Literal[False] | None = None
    suffix: None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class TokenLogprobs(BaseModel):
    """Of the sampled tokens, named by their ids."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: None = None
    text_offset: list[int] = []


class Choice(BaseModel):
    """One completion; choices of prompt i are n·i … n·i + n−1."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: TokenLogprobs | None = None


class CompletionAnswer(BaseModel):
    """The answer, or one chunk of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None = Field(default=None, description="The version that answered.")
    choices: list[Choice]
    usage: Usage | None = None


@router.post("/v1/completions", response_model=CompletionAnswer, responses=documented(*POSTED) | STREAMED)
async def complete(request: Request, body: CompletionBody) -> CompletionAnswer | StreamingResponse:
    """OpenAI's completions."""
    visit = visit_of(request)
    client = room_of(request).upstreams.generator(body.model)
    if body.best_of not in (None, body.n or 1):
        raise refused("best_of", f"only as many as n, {body.n or 1}: completions are not ranked here")
    sampling = body.sampling(body.max_tokens)
    completions = client.generate(_prompts(body), sampling, timeout_s=visit.left_s)
    if body.stream:
        return await streaming(request, _chunks(body, visit, completions))
    found, count = [completion async for completion in completions], UsageCount()
    for completion in found:
        count.add(completion)
    choices = sorted((_choice(body, completion) for completion in found), key=lambda choice: choice.index)
    return _answer(body, visit, choices, fingerprint(found), count.usage())


async def _chunks(body: CompletionBody, visit: Visit, completions: AsyncIterator[Completion]) -> AsyncIterator[str]:
    count, made_by = UsageCount(), None
    async for completion in completions:
        count.add(completion)
        made_by = fingerprint([completion])
        yield event(_answer(body, visit, [_choice(body, completion)], made_by, None).model_dump_json())
    if body.wants_usage:
        yield event(_answer(body, visit, [], made_by, count.usage()).model_dump_json())
    yield event("[DONE]")


def _prompts(body: CompletionBody) -> list[Prompt]:
    prompt = body.prompt
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]  # type: ignore[list-item]
    return prompt  # type: ignore[return-value]


def _choice(body: CompletionBody, completion: Completion) -> Choice:
    logprobs = None
    if body.logprobs is not None:
        logprobs = TokenLogprobs(tokens=token_names(completion), token_logprobs=completion.logprobs.tolist())
    return Choice(
        index=completion.prompt_index * (body.n or 1) + completion.sample_index,
        text=completion.text,
        finish_reason=completion.finish_reason,
        logprobs=logprobs,
    )


def _answer(
    body: CompletionBody, visit: Visit, choices: list[Choice], made_by: str | None, usage: Usage | None
) -> CompletionAnswer:
    return CompletionAnswer(
        id=f"cmpl-{visit.request_id}",
        created=int(time.time()),
        model=body.model,
        system_fingerprint=made_by,
        choices=choices,
        usage=usage,
    )
