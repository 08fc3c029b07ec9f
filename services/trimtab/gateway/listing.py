"""`/v1/models`: what the services behind the gateway serve now, in a form that OpenAI's clients read too."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, Field

from trimtab.gateway.guard import visit_of
from trimtab.gateway.problems import READ, Problem, documented
from trimtab.gateway.room import room_of
from trimtab.gateway.schemas import Version
from trimtab_client import AsyncGeneratorClient, AsyncRewardClient, ModelInfo, TrimtabError

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


class ModelEntry(BaseModel):
    """One model. `served` is null while its service cannot be reached; `reason` then says why."""

    id: str = Field(examples=["policy"])
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "trimtab"
    task: Literal["generate", "score"]
    served: ServedModel | None = None
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
    entries = await asyncio.gather(*(_entry(name, role, client, timeout_s) for name, role, client in served))
    return ModelList(data=entries)


@router.get("/v1/models/{name}", responses=documented(*READ))
async def get_model(request: Request, name: Annotated[str, Path(max_length=256, examples=["policy"])]) -> ModelEntry:
    """One model."""
    timeout_s = min(PATIENCE_S, visit_of(request).left_s)
    for known, role, client in room_of(request).upstreams.served():
        if name == known:
            return await _entry(known, role, client, timeout_s)
    raise Problem("NOT_FOUND", f"name: no model {name!r} here; /v1/models lists them", field="name")


async def _entry(
    name: str, role: str, client: AsyncRewardClient | AsyncGeneratorClient, timeout_s: float
) -> ModelEntry:
    task: Literal["generate", "score"] = "generate" if role == "generate" else "score"
    try:
        info = await client.get_model(timeout_s)
    except TrimtabError as error:
        return ModelEntry(id=name, task=task, reason=f"{error.code}: {error.message}")
    return ModelEntry(id=name, task=task, served=_served(info))


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
