"""How bodies are read: as JSON Schema means it, 58.0 is an integer (FastAPI alone would make it a float), and counted.

What is checked field by field must not be many times what a request may hold: that would keep everybody waiting.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from trimtab.gateway.problems import unprocessable
from trimtab.gateway.room import room_of

WHOLE = 2**53  # beyond, a float stands for several integers
ROWS = ("items", "conversations", "token_ids", "references", "prompts", "prompt", "query", "labels", "input")
"""Where bodies have a value for each sequence."""
MOST_NAMES = 1024
"""Of one object: more than any has, and few enough to refuse one by one."""


class JsonRoute(APIRoute):
    """A route that reads its body so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, given a request that reads so."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            read = _JsonRequest(request.scope, request.receive)
            with suppress(ValueError, RecursionError):  # no JSON: the handler comes upon that again, and refuses it
                _count_rows(await read.json(), room_of(request).config.max_rows)
            return await handler(read)

        return handle


class _JsonRequest(Request):
    async def json(self) -> Any:
        """The body, parsed. Problem where an object has too many names."""
        if not hasattr(self, "_json"):
            self._json = json.loads(await self.body(), parse_float=_number, object_pairs_hook=_object)
        return self._json


def _count_rows(body: Any, most: int) -> None:
    for name in ROWS:
        rows = body.get(name) if isinstance(body, dict) else None
        if not isinstance(rows, list) or len(rows) <= most:
            continue
        if name != "prompt" or not isinstance(rows[0], int):  # that is one sequence
            raise unprocessable(name, f"{len(rows):,}, but a request may hold {most:,}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MOST_NAMES:
        raise unprocessable("body", f"an object of {len(pairs):,} names, but at most {MOST_NAMES:,} are read")
    return dict(pairs)


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() and abs(value) <= WHOLE else value
