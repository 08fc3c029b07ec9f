"""`/v1/score`: the reward model's score of prompt–response pairs, conversations or token ids."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Body, Request
from pydantic import BaseModel, Discriminator, Field, Tag

from trimtab.gateway.guard import visit_of
from trimtab.gateway.json_bodies import JsonRoute
from trimtab.gateway.problems import POSTED, documented, in_callers_words, refused
from trimtab.gateway.room import room_of
from trimtab.gateway.schemas import Body as Fields
from trimtab.gateway.schemas import Conversation, Pin, Text, TokenIds, Version, messages_of, which
from trimtab_client import RaggedTokens, Scores

router = APIRouter(route_class=JsonRoute, tags=["trimtab"])

# The service's fields, and what they are called here.
WORDS = {
    "texts.items": "items",
    "conversations.conversations": "conversations",
    "conversations.references": "references",
    "tokens.references": "references",
    "tokens.tokenizer_digest": "tokenizer_digest",
    "tokens": "token_ids",
    "scorer": "model",
}


class Pair(Fields):
    """A prompt and a response to it, as texts."""

    prompt: Text = Field(examples=["How do I boil an egg?"])
    response: Text = Field(examples=["Eight minutes in boiling water."])
    reference: Text = Field(default="", description="What a verifier compares the response with.")


class ScoreOptions(Fields):
    """What every form of the body may say."""

    model: str | None = Field(
        default=None,
        max_length=256,
        description="A name of /v1/models; absent: the default one.",
        examples=["reward"],
    )
    truncate: bool = Field(default=False, description="Cut what is too long at its end instead of refusing it.")
    deterministic: bool = Field(default=False, description="Bitwise the same score in any company, at a lower rate.")
    version: Pin | None = None


References = Annotated[
    Annotated[list[Text], Field(fail_fast=True)] | None, Field(description="For verifiers: one a sequence.")
]


class ScorePairs(ScoreOptions):
    """Texts, encoded by the reward model's own tokenizer."""

    items: list[Pair] = Field(min_length=1, fail_fast=True)


class ScoreConversations(ScoreOptions):
    """Conversations through the reward model's own chat template; the last message is the response."""

    conversations: list[Conversation] = Field(min_length=1, fail_fast=True)
    references: References = None


class ScoreTokens(ScoreOptions):
    """Token ids of the tokenizer with that digest, which must be the reward model's."""

    token_ids: list[TokenIds] = Field(min_length=1, fail_fast=True)
    tokenizer_digest: str = Field(max_length=256, description="From /v1/models.")
    references: References = None


ScoreBody = Annotated[
    Annotated[ScorePairs, Tag("<items>")]
    | Annotated[ScoreConversations, Tag("<conversations>")]
    | Annotated[ScoreTokens, Tag("<token_ids>")],
    Discriminator(which("items", "conversations", "token_ids")),
]


class Part(BaseModel):
    """One scorer's share of a weighted sum, which adds weight · scores of each."""

    scorer: str
    weight: float
    scores: list[float]
    version: Version


class ScoreReply(BaseModel):
    """One score a sequence, in the order of the request."""

    scores: list[float] = Field(description="The bare logit.", examples=[[1.25]])
    normalized_scores: list[float] = Field(
        description="(score - mean) / deviation, with the version's own constants.", examples=[[0.5]]
    )
    truncated: list[int] = Field(description="Positions of what was cut.")
    version: Version
    scorer: str = Field(description="The scorer that answered.", examples=["model"])
    parts: list[Part] = Field(default=[], description="Of a weighted sum: what it is made of.")


EXAMPLES = {
    "pairs": {"value": {"items": [{"prompt": "How do I boil an egg?", "response": "Eight minutes in boiling water."}]}},
    "conversations": {
        "value": {
            "conversations": [
                [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "Hello. How can I help?"}]
            ]
        }
    },
    "tokens": {"value": {"token_ids": [[1, 403, 261]], "tokenizer_digest": "blake3:…", "truncate": True}},
}


@router.post("/v1/score", responses=documented(*POSTED))
async def score(request: Request, body: Annotated[ScoreBody, Body(openapi_examples=EXAMPLES)]) -> ScoreReply:  # type: ignore[arg-type]
    """Score sequences. A score does not depend on what else is in the batch; large batches are split over replicas."""
    model = room_of(request).upstreams.reward(body.model)
    client, options = model.client, _options(body, model.scorer, visit_of(request).left_s)
    if isinstance(body, ScorePairs):
        pairs = [(item.prompt, item.response) for item in body.items]
        call = client.score_texts(pairs, **options)
    elif isinstance(body, ScoreConversations):
        conversations = [messages_of(conversation) for conversation in body.conversations]
        call = client.score_chats(conversations, **options)
    else:
        if not body.tokenizer_digest:
            raise refused("tokenizer_digest", "is empty; /v1/models names it")
        tokens = RaggedTokens.from_sequences([np.asarray(ids, dtype=np.int32) for ids in body.token_ids])
        call = client.score_tokens(tokens, body.tokenizer_digest, **options)
    return reply_of(await in_callers_words(call, WORDS))


def _options(body: ScorePairs | ScoreConversations | ScoreTokens, scorer: str, timeout_s: float) -> dict[str, Any]:
    return {
        "version": body.version.rule() if body.version is not None else None,
        "truncate": body.truncate,
        "timeout_s": timeout_s,
        "scorer": scorer,
        "deterministic": body.deterministic,
        "references": _references(body),
    }


def _references(body: ScorePairs | ScoreConversations | ScoreTokens) -> list[str] | None:
    if isinstance(body, ScorePairs):
        given = [item.reference for item in body.items]
        return given if any(given) else None
    count = len(body.conversations if isinstance(body, ScoreConversations) else body.token_ids)
    if body.references is not None and len(body.references) != count:
        raise refused("references", f"{len(body.references)} for {count} sequences")
    return body.references


def reply_of(found: Scores) -> ScoreReply:
    """The SDK's scores as they are shown."""
    return ScoreReply(
        scores=found.scores.tolist(),
        normalized_scores=found.normalized_scores.tolist(),
        truncated=list(found.truncated),
        version=Version.of(found.version),
        scorer=found.scorer,
        parts=[
            Part(scorer=p.scorer, weight=p.weight, scores=p.scores.tolist(), version=Version.of(p.version))
            for p in found.parts
        ],
    )
