"""`/v1/generate`: completions of the policy, all at once or each as it finishes (server-sent events)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from trimtab.gateway.events import STREAMED, event, streaming
from trimtab.gateway.guard import visit_of
from trimtab.gateway.json_bodies import JsonRoute
from trimtab.gateway.problems import POSTED, documented
from trimtab.gateway.room import room_of
from trimtab.gateway.schemas import SEEDS, Body, Conversation, Pin, Text, TokenId, TokenIds, Version, messages_of
from trimtab_client import Completion, Sampling

router = APIRouter(route_class=JsonRoute, tags=["trimtab"])


def _kind(value: object) -> str:
    if isinstance(value, str):
        return "<text>"
    first = value[0] if isinstance(value, list) and value else None
    return "<chat>" if isinstance(first, dict | BaseModel) else "<token_ids>"


Prompt = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[TokenIds, Tag("<token_ids>")] | Annotated[Conversation, Tag("<chat>")],
    Discriminator(_kind),
]


class SamplingBody(Body):
    """How completions are sampled."""

    n: int = Field(default=1, ge=1, le=4096, description="Samples a prompt.")
    max_tokens: int = Field(default=0, ge=0, le=2**20, description="0: the server's default.")
    temperature: float = Field(default=1.0, ge=0, le=100, allow_inf_nan=False, description="0 samples greedily.")
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=2**31 - 1, description="0 is off.")
    stop: list[Annotated[str, Field(min_length=1, max_length=1024)]] = Field(default=[], max_length=64)
    stop_token_ids: list[TokenId] = Field(default=[], max_length=1024)
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0, le=2**20)
    seed: int | None = Field(default=None, description="The same seed, modulo 2^64, samples the same.")

    def sampling(self) -> Sampling:
        """As the SDK takes it."""
        return Sampling(
            n=self.n,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            seed=None if self.seed is None else self.seed % SEEDS,
        )


class GenerateBody(Body):
    """Prompts, each a text, token ids or chat messages, and how to answer them."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompts": ["Once upon a time"], "sampling": {"max_tokens": 32, "n": 2, "seed": 1}},
                {"prompts": [[{"role": "user", "content": "Hello!"}]], "stream": True},
            ]
        }
    )

    prompts: list[Prompt] = Field(min_length=1, fail_fast=True)
    sampling: SamplingBody = SamplingBody()
    model: str | None = Field(default=None, max_length=256, description="A name of /v1/models; the only one if absent.")
    version: Pin | None = None
    stream: bool = Field(default=False, description="Send each completion as it finishes.")
    return_tokens: bool = Field(default=False, description="Token ids and log-probs too.")


class VersionRun(BaseModel):
    """Consecutive tokens sampled by one version."""

    version: Version
    token_count: int


class CompletionReply(BaseModel):
    """One sampled response."""

    prompt_index: int
    sample_index: int
    text: str
    finish_reason: Literal["stop", "length"]
    token_count: int
    versions: list[VersionRun]
    seed: int = Field(description="Sampling this prompt with this seed gives this completion.")
    token_ids: list[int] | None = None
    logprobs: list[float] | None = Field(default=None, description="Of logits / temperature, over the vocabulary.")


class GenerateReply(BaseModel):
    """All completions, ordered by prompt and sample."""

    completions: list[CompletionReply]


@router.post("/v1/generate", response_model=GenerateReply, responses=documented(*POSTED) | STREAMED)
async def generate(request: Request, body: GenerateBody) -> GenerateReply | StreamingResponse:
    """Sample completions. With `stream` each is an event `completion`, behind the last comes `done`, or `error`."""
    client = room_of(request).upstreams.generator(body.model)
    completions = client.generate(
        [prompt if isinstance(prompt, str) else _prompt(prompt) for prompt in body.prompts],
        body.sampling.sampling(),
        version=body.version.rule() if body.version is not None else None,
        timeout_s=visit_of(request).left_s,
    )
    if body.stream:
        return await streaming(request, _events(completions, body.return_tokens))
    found = [_reply(completion, body.return_tokens) async for completion in completions]
    return GenerateReply(completions=sorted(found, key=lambda reply: (reply.prompt_index, reply.sample_index)))


async def _events(completions: AsyncIterator[Completion], return_tokens: bool) -> AsyncIterator[str]:
    async for completion in completions:
        yield event(_reply(completion, return_tokens).model_dump_json(), name="completion")
    yield event("{}", name="done")


def _prompt(prompt: list[int] | Conversation) -> list[int] | list[dict[str, str]]:
    if isinstance(prompt[0], int):
        return prompt  # type: ignore[return-value]
    return messages_of(prompt)  # type: ignore[arg-type]


def _reply(completion: Completion, return_tokens: bool) -> CompletionReply:
    runs = [VersionRun(version=Version.of(run.version), token_count=run.token_count) for run in completion.versions]
    return CompletionReply(
        prompt_index=completion.prompt_index,
        sample_index=completion.sample_index,
        text=completion.text,
        finish_reason=completion.finish_reason,
        token_count=len(completion.token_ids),
        versions=runs,
        seed=completion.seed,
        token_ids=completion.token_ids.tolist() if return_tokens else None,
        logprobs=completion.logprobs.tolist() if return_tokens else None,
    )
