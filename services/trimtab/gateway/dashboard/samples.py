"""The sample browser: a prompt, the SFT policy's answer and a later one, and what the step knew of each token."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

from trimtab.gateway.dashboard.events import RunId, Step, trainer_of
from trimtab.gateway.dashboard.pages import page, roles_of
from trimtab.gateway.guard import visit_of
from trimtab.gateway.room import room_of
from trimtab_client import Sample, Sampling, TrimtabError

router = APIRouter(include_in_schema=False)
MOST_TOKENS = 512
FULL_KL_NATS, FULL_VALUE = 1.0, 2.0
"""What colours a token fully; values are in deviations of the reward."""


class Asked(BaseModel):
    """A prompt for the policy that is served now."""

    prompt: str = Field(min_length=1, max_length=100_000)


@router.get("/dashboard/samples")
async def samples(request: Request, run_id: RunId = "", step: Step = 0, every: bool = False) -> Response:
    """The newest answers to the prompts that the run began with, or with `every` all that were kept of a step."""
    room = room_of(request)
    found: tuple[Sample, ...] = ()
    trouble = ""
    try:
        trainer = trainer_of(request)
        run_id = run_id or (await trainer.status()).run_id
        found = await trainer.samples(run_id, step, watched=not every and not step)
    except TrimtabError as error:
        trouble = error.message
    may_ask = room.config.generator is not None and "generate" in await roles_of(request)
    shown = [_view(sample) for sample in found]
    return await page(
        request, "samples", run_id=run_id, step=step, every=every, samples=shown, trouble=trouble, may_ask=may_ask
    )


@router.post("/dashboard/answer")
async def answer(request: Request, asked: Annotated[Asked, Body()]) -> Response:
    """What the generator answers now: the text and the version that sampled it."""
    client = room_of(request).upstreams.generator(None)
    sampling = Sampling(max_tokens=MOST_TOKENS)
    async for completion in client.generate([asked.prompt], sampling=sampling, timeout_s=visit_of(request).left_s):
        return JSONResponse({"text": completion.text, "version": str(completion.versions[-1].version)})
    return JSONResponse({"text": "", "version": ""})


def _view(sample: Sample) -> dict[str, Any]:
    """A sample as the page shows it: each token with its numbers, and how strongly each colours it."""
    seen = asdict(sample)
    for one, shown in ((sample, seen), (sample.first, seen["first"])):
        if one is not None:
            shown["marks"] = [_mark(*token) for token in zip(one.tokens, one.kl_nats, one.values, strict=True)]
            shown["rest"] = one.text if not one.tokens else ""
            shown["kl_sum"] = math.fsum(one.kl_nats)
    return seen


def _mark(text: str, kl_nats: float, value: float) -> dict[str, Any]:
    return {
        "text": text,
        "kl": kl_nats,
        "value": value,
        "kl_level": _level(kl_nats, 1.0),
        "value_level": _level(value, 2.0),
    }


def _level(number: float, full: float) -> int:
    """−5 to 5: how far `number` goes towards ±`full`, in fifths."""
    if not math.isfinite(number):
        return 0
    return max(-5, min(5, round(5 * number / full)))
