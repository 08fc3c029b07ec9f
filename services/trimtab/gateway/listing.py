"""`/v1/models`: what the services behind the gateway serve now, in a form that OpenAI's clients read too."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, Field

from trimtab.gateway.guard import visit_of
from trimtab.gateway.problems import READ, Problem, documented
from trimtab.gateway.room import room_of
from trimtab.gateway.schemas import Version
from trimtab.gateway.upstreams import scorer_in
from trimtab_client import AsyncGeneratorClient, AsyncRewardClient, ModelInfo, ScorerInfo, TrimtabError

router = APIRouter(tags=["trimtab"])

PATIENCE_S = 5.0


class ServedModel(BaseModel):
    """What a service serves: everything that a client needs to know before it sends tokens."""

    version: Version
    tokenizer_digest: str
    vocab_size: int
    max_length: int = Field(description="Longest sequence, prompt and response together, in tokens.")
    dtype: str
    architecture: str
    parameter_count: int
    has_chat_template: bool


class Scorer(BaseModel):
    """What one of several scorers of a reward service is."""

    kind: str = Field(description="model, sum, length, regex, answer or function.")
    version: Version
    tokenizer_digest: str = Field(description="Empty where it takes text only.")
    max_length: int = Field(description="Longest sequence in tokens; 0: any.")
    needs_reference: bool
    weights: dict[str, float] = Field(description="Of a weighted sum.")


class ModelEntry(BaseModel):
    """One model. `served` is null while its service cannot be reached; `reason` then says why.

    Several scorers of a reward service are models too, by the name NAME:SCORER, with `scorer` in place of `served`.
    """

    id: str = Field(examples=["policy"])
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "trimtab"
    task: Literal["generate", "score"]
    served: ServedModel | None = None
    scorer: Scorer | None = None
    reason: str | None = None


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


@router.get("/v1/models", responses=documented(*READ))
async def list_models(request: Request) -> ModelList:
    """The models, by the names that requests may give."""
    timeout_s = min(PATIENCE_S, visit_of(request).left_s)
    served = room_of(request).upstreams.served()
    found = await asyncio.gather(*(_entries(names, client, timeout_s) for names, client in served))
    return ModelList(data=[entry for entries in found for entry in entries])


@router.get("/v1/models/{name:path}", responses=documented(*READ))
async def get_model(request: Request, name: Annotated[str, Path(max_length=256, examples=["policy"])]) -> ModelEntry:
    """One model."""
    timeout_s = min(PATIENCE_S, visit_of(request).left_s)
    for names, client in room_of(request).upstreams.served():
        if scorer_in(name, names) is not None:
            entries = await _entries(names, client, timeout_s)
            wanted = name if name in names else f"{names[0]}:{scorer_in(name, names)}"
            for entry in entries:
                if entry.id == wanted:
                    return entry.model_copy(update={"id": name})
    raise Problem("NOT_FOUND", f"name: no model {name!r} here; /v1/models lists them", field="name")


async def _entries(
    names: Sequence[str], client: AsyncRewardClient | AsyncGeneratorClient, timeout_s: float
) -> list[ModelEntry]:
    """A service's model by each of its names, and each of several scorers by the first of them."""
    task: Literal["generate", "score"] = "score" if isinstance(client, AsyncRewardClient) else "generate"
    try:
        info = await client.get_model(timeout_s)
    except TrimtabError as error:
        return [ModelEntry(id=name, task=task, reason=f"{error.code}: {error.message}") for name in names]
    several = info.scorers if len(info.scorers) > 1 else ()
    scorers = [ModelEntry(id=f"{names[0]}:{one.name}", task=task, scorer=_scorer(one)) for one in several]
    return [*(ModelEntry(id=name, task=task, served=_served(info)) for name in names), *scorers]


def _scorer(info: ScorerInfo) -> Scorer:
    return Scorer(
        kind=info.kind,
        version=Version.of(info.version),
        tokenizer_digest=info.tokenizer_digest,
        max_length=info.max_length,
        needs_reference=info.needs_reference,
        weights=dict(info.weights),
    )


def _served(info: ModelInfo) -> ServedModel:
    return ServedModel(
        version=Version.of(info.version),
        tokenizer_digest=info.tokenizer_digest,
        vocab_size=info.vocab_size,
        max_length=info.max_length,
        dtype=info.dtype,
        architecture=info.architecture,
        parameter_count=info.parameter_count,
        has_chat_template=info.has_chat_template,
    )
