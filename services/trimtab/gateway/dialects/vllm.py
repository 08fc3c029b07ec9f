"""vLLM's `/classify` for a model of one label: the reward model as verl and others ask for it.

`probs` holds the bare logit of each input. vLLM would put a sigmoid over it unless `use_activation` is false; here it
is applied only where a caller asks for it by name, for a reward is the logit.
"""

from __future__ import annotations

import time
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from trimtab.gateway.guard import visit_of
from trimtab.gateway.json_bodies import JsonRoute
from trimtab.gateway.problems import POSTED, documented, in_callers_words
from trimtab.gateway.room import room_of
from trimtab.gateway.schemas import Body, Text

router = APIRouter(route_class=JsonRoute, tags=["dialects"])

WORDS = {"texts.items": "input", "scorer": "model"}
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]


class ClassifyBody(Body):
    """Texts to score, each a whole of prompt and response."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "reward", "input": ["How are you? Fine."], "use_activation": False}]}
    )

    model: str | None = Field(default=None, max_length=256)
    input: Text | Texts
    use_activation: bool | None = Field(default=None, description="True: the sigmoid of the logit.")
    truncate_prompt_tokens: Literal[-1] | None = Field(default=None, description="-1: cut what is too long.")
    priority: int = 0
    user: str | None = None


class Classified(BaseModel):
    """One input's score."""

    index: int
    label: Literal["LABEL_0"] = "LABEL_0"
    probs: list[float]
    num_classes: Literal[1] = 1


class Usage(BaseModel):
    """Always 0: the reward service counts its tokens in its metrics."""

    prompt_tokens: int = 0
    total_tokens: int = 0
    completion_tokens: int = 0


class ClassifyReply(BaseModel):
    """One entry an input, in order."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]
    usage: Usage = Usage()


@router.post("/classify", responses=documented(*POSTED))
async def classify(request: Request, body: ClassifyBody) -> ClassifyReply:
    """vLLM's classification, of the reward model."""
    room, visit = room_of(request), visit_of(request)
    model = room.upstreams.reward(body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    cut = body.truncate_prompt_tokens is not None
    call = model.client.score_texts(
        [("", text) for text in texts], truncate=cut, timeout_s=visit.left_s, scorer=model.scorer
    )
    found = await in_callers_words(call, WORDS)
    values = (1 + np.tanh(found.scores / 2)) / 2 if body.use_activation else found.scores
    return ClassifyReply(
        id=f"classify-{visit.request_id}",
        created=int(time.time()),
        model=body.model or room.upstreams.reward_name,
        data=[Classified(index=index, probs=[float(value)]) for index, value in enumerate(values)],
    )
