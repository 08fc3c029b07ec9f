"""Server-sent events: how a stream begins, what an event looks like, and what comes when it fails half-way."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from trimtab.gateway.guard import like_openai, visit_of
from trimtab.gateway.problems import Problem
from trimtab_client import TrimtabError

EVENT_STREAM = "text/event-stream"
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "With `stream` these events, else JSON.",
        "content": {
            EVENT_STREAM: {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON."}},
                }
            }
        },
    }
}


def event(data: str, name: str | None = None) -> str:
    """One event of one line of data."""
    return f"event: {name}\ndata: {data}\n\n" if name else f"data: {data}\n\n"


async def streaming(request: Request, events: AsyncIterator[str]) -> StreamingResponse:
    """The response of these events. What fails before the first one is a plain refusal, later an event `error`."""
    try:
        first = await anext(events)
    except StopAsyncIteration:
        first = ""

    async def all_of_them() -> AsyncIterator[str]:
        try:
            yield first
            async for one in events:
                yield one
        except TrimtabError as error:
            path = request.url.path
            body = Problem.of(error).body(visit_of(request).request_id, like_openai=like_openai(path))
            yield event(json.dumps(body), name=None if like_openai(path) else "error")
        finally:
            closing = getattr(events, "aclose", None)
            if closing is not None:
                with contextlib.suppress(RuntimeError):  # it is running: its own cancellation is on the way
                    await closing()

    return StreamingResponse(all_of_them(), media_type=EVENT_STREAM, headers={"x-accel-buffering": "no"})
