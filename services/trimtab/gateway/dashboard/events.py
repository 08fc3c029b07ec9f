"""A run as server-sent events: what it does, and the metrics of each step, from TrainerService.Watch.

A stream ends after some seconds, so that a browser can tell a quiet run from a dead connection; it comes back and names
the last step that it has seen (static/live.js).
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse

from trimtab.gateway.guard import visit_of
from trimtab.gateway.problems import Problem
from trimtab.gateway.room import room_of
from trimtab.gateway.schemas import STEP_MAX
from trimtab_client import AsyncTrainerClient, RunStatus, StepMetrics, TrimtabError

router = APIRouter(include_in_schema=False)
LONGEST_STREAM_S = 20.0
MARGIN_S = 2.0
RunId = Annotated[str, Query(max_length=128)]
Step = Annotated[int, Query(ge=0, le=STEP_MAX)]


def trainer_of(request: Request) -> AsyncTrainerClient:
    """The trainer behind the gateway; Problem 404 where there is none."""
    trainer = room_of(request).upstreams.trainer
    if trainer is None:
        raise Problem("NOT_FOUND", "no trainer is behind this gateway; set `trainer` in its settings")
    return trainer


@router.get("/dashboard/events")
async def events(request: Request, run_id: RunId = "", after: Step = 0) -> Response:
    """The events of a run ("": the newest) behind step `after`."""
    longest_s = min(LONGEST_STREAM_S, visit_of(request).left_s - MARGIN_S)
    stream = _stream(trainer_of(request), run_id, after, longest_s)
    return StreamingResponse(stream, media_type="text/event-stream")


async def _stream(trainer: AsyncTrainerClient, run_id: str, after: int, left_s: float) -> AsyncIterator[str]:
    try:
        async with asyncio.timeout(max(0.1, left_s)), aclosing(_events(trainer, run_id, after)) as found:
            async for event in found:
                yield event
    except TimeoutError:
        return
    except TrimtabError as error:
        yield _event("trouble", {"code": error.code, "message": error.message})


async def _events(trainer: AsyncTrainerClient, run_id: str, after: int) -> AsyncGenerator[str]:
    status = await trainer.status(run_id)
    yield _event("status", _status(status))
    async for event in trainer.watch(status.run_id, after):
        if isinstance(event, StepMetrics):
            values = {name: value for name, value in event.values.items() if math.isfinite(value)}
            data = {"step": event.step, "total_steps": event.total_steps, "values": values}
            yield _event("step", data)
        else:
            yield _event("status", _status(event))


def _status(status: RunStatus) -> dict[str, object]:
    values = asdict(status)
    values.pop("published")
    return values | {"published": len(status.published), "finished": status.finished}


def _event(name: str, data: object) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
