"""OpenRLHF's remote reward request: `--reward.remote_url http://gateway:7120/get_reward` instead of its `serve_rm`.

Its trainer sends the decoded whole of prompt and response as `query`, special tokens included, beside the prompt. The
part behind the prompt is scored as the response; where `query` does not begin with its prompt, all of it is. Labels
that are texts are what a verifier compares the responses with.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from trimtab.gateway.guard import visit_of
from trimtab.gateway.json_bodies import JsonRoute
from trimtab.gateway.problems import POSTED, documented, in_callers_words, refused, unprocessable
from trimtab.gateway.room import room_of
from trimtab.gateway.schemas import Body, Text
from trimtab_client.adapters.openrlhf import labels_as_references, split_query

router = APIRouter(route_class=JsonRoute, tags=["dialects"])


WORDS = {"texts.items": "query", "scorer": "model"}


class RemoteRewardBody(Body):
    """What OpenRLHF posts; anything else that it adds is not looked at."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [{"query": ["How are you? Fine."], "prompts": ["How are you?"], "labels": [""]}]
        },
    )

    query: Annotated[list[Text], Field(min_length=1, fail_fast=True)]
    prompts: Annotated[list[Text], Field(fail_fast=True)] | None = None
    labels: Any = None


class RemoteRewardReply(BaseModel):
    """Raw scores, as its own server answers; the normalised ones go into its logs."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


@router.post("/get_reward", responses=documented(*POSTED))
async def get_reward(
    request: Request, body: RemoteRewardBody, model: Annotated[str | None, Query(max_length=256)] = None
) -> RemoteRewardReply:
    """OpenRLHF's remote reward model. `?model=NAME:SCORER` behind the address chooses one of several."""
    room = room_of(request)
    chosen = room.upstreams.reward(model)
    prompts = body.prompts or [""] * len(body.query)
    if len(prompts) != len(body.query):
        raise refused("prompts", f"{len(prompts)} for {len(body.query)} queries")
    pairs = [
        split_query(query, prompt, room.config.strip_special) for query, prompt in zip(body.query, prompts, strict=True)
    ]
    call = chosen.client.score_texts(
        pairs,
        timeout_s=visit_of(request).left_s,
        scorer=chosen.scorer,
        references=_references(body.labels, len(pairs)),
    )
    found = await in_callers_words(call, WORDS)
    scores = found.scores.tolist()
    return RemoteRewardReply(
        rewards=scores, scores=scores, extra_logs={"normalized_scores": found.normalized_scores.tolist()}
    )


def _references(labels: Any, count: int) -> list[str] | None:
    found = labels_as_references(labels, count)
    for index, text in enumerate(found or ()):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise unprocessable(f"labels[{index}]", "is no text: it holds half of a surrogate pair")
    return found
