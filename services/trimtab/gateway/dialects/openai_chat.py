"""OpenAI's `/v1/chat/completions` over the generator, through the policy's own chat template; streamed or not.

The generator sends a completion when it is finished, so a stream brings each choice whole: its role, its text, its end.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from trimtab.gateway.dialects.openai_sampling import (
    MOST_TOKENS,
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
from trimtab.gateway.schemas import MOST_MESSAGES, Body, Text
from trimtab_client import Completion

router = APIRouter(route_class=JsonRoute, tags=["dialects"])


class TextPart(Body):
    """A part of a message that is text; the policy reads nothing else."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One message."""

    role: str = Field(min_length=1, max_length=64)
    content: Text | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: str | None = Field(default=None, description="Not used.")

    @property
    def text(self) -> str:
        """Its parts as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(Body):
    """Plain text."""

    type: Literal["text"]


class ChatBody(SamplingFields):
    """A conversation to go on with."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "policy", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 32}]
        }
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=0, le=MOST_TOKENS)
    logprobs: bool | None = Field(default=None, description="The sampled tokens' own, of logits / temperature.")
    top_logprobs: Literal[0] | None = None
    response_format: TextFormat | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class TokenLogprob(BaseModel):
    """Of one sampled token, named by its id."""

    token: str
    logprob: float
    bytes: None = None
    top_logprobs: list[None] = []


class Logprobs(BaseModel):
    """Of the sampled tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class Reply(BaseModel):
    """The model's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """One completion."""

    index: int
    message: Reply
    finish_reason: Literal["stop", "length"]
    logprobs: Logprobs | None = None


class ChatAnswer(BaseModel):
    """The answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str | None = Field(default=None, description="The version that answered.")
    choices: list[Choice]
    usage: Usage | None = None


class Delta(BaseModel):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """What a chunk adds to a choice."""

    index: int
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: Logprobs | None = None


class ChatChunk(BaseModel):
    """One event of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[ChunkChoice]
    usage: Usage | None = None


@router.post("/v1/chat/completions", response_model=ChatAnswer, responses=documented(*POSTED) | STREAMED)
async def chat(request: Request, body: ChatBody) -> ChatAnswer | StreamingResponse:
    """OpenAI's chat completions."""
    visit = visit_of(request)
    client = room_of(request).upstreams.generator(body.model)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise refused("max_completion_tokens", "says something else than max_tokens; give one of them")
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    conversation = [{"role": message.role, "content": message.text} for message in body.messages]
    completions = client.generate([conversation], body.sampling(most), timeout_s=visit.left_s)
    if body.stream:
        return await streaming(request, _chunks(body, visit, completions))
    found, count = [completion async for completion in completions], UsageCount()
    for completion in found:
        count.add(completion)
    return ChatAnswer(
        id=f"chatcmpl-{visit.request_id}",
        created=int(time.time()),
        model=body.model,
        system_fingerprint=fingerprint(found),
        choices=sorted((_choice(body, completion) for completion in found), key=lambda choice: choice.index),
        usage=count.usage(),
    )


async def _chunks(body: ChatBody, visit: Visit, completions: AsyncIterator[Completion]) -> AsyncIterator[str]:
    created, count, made_by = int(time.time()), UsageCount(), None

    def chunk(choices: list[ChunkChoice], usage: Usage | None = None) -> str:
        answer = ChatChunk(
            id=f"chatcmpl-{visit.request_id}",
            created=created,
            model=body.model,
            system_fingerprint=made_by,
            choices=choices,
            usage=usage,
        )
        return event(answer.model_dump_json(exclude_none=usage is not None))

    async for completion in completions:
        count.add(completion)
        made_by = fingerprint([completion])
        index = completion.sample_index
        delta = Delta(role="assistant", content=completion.text)
        yield chunk([ChunkChoice(index=index, delta=delta, logprobs=_logprobs(body, completion))])
        yield chunk([ChunkChoice(index=index, delta=Delta(), finish_reason=completion.finish_reason)])
    if body.wants_usage:
        yield chunk([], count.usage())
    yield event("[DONE]")


def _choice(body: ChatBody, completion: Completion) -> Choice:
    return Choice(
        index=completion.sample_index,
        message=Reply(content=completion.text),
        finish_reason=completion.finish_reason,
        logprobs=_logprobs(body, completion),
    )


def _logprobs(body: ChatBody, completion: Completion) -> Logprobs | None:
    if not body.logprobs:
        return None
    pairs = zip(token_names(completion), completion.logprobs.tolist(), strict=True)
    return Logprobs(content=[TokenLogprob(token=token, logprob=logprob) for token, logprob in pairs])
