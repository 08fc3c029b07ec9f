"""What a caller is told when something goes wrong: one JSON shape, one HTTP status for each canonical code.

`{"error": {"code": "INVALID_ARGUMENT", "message": …, "field": "items[0].response", "request_id": …}}`. The routes of
OpenAI's dialect add that API's own `type` and `param`.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from trimtab_client.errors import TrimtabError

T = TypeVar("T")

STATUSES = {
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "INTERNAL": 500,
    "UNKNOWN": 500,
    "DATA_LOSS": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
CODES = {
    404: "NOT_FOUND",
    405: "UNIMPLEMENTED",
    408: "DEADLINE_EXCEEDED",
    413: "OUT_OF_RANGE",
    415: "INVALID_ARGUMENT",
    500: "INTERNAL",
}
UNPROCESSABLE = 422


class ErrorBody(BaseModel):
    """What went wrong and what to do about it."""

    code: str = Field(description="The canonical gRPC code.", examples=["INVALID_ARGUMENT"])
    message: str = Field(examples=["items[0].response: Field required"])
    field: str | None = Field(default=None, description="The field that is wrong.", examples=["items[0].response"])
    request_id: str = Field(description="Also in the header x-request-id and in the gateway's log.")
    type: str | None = Field(default=None, description="OpenAI's routes only: the code in lower case.")
    param: str | None = Field(default=None, description="OpenAI's routes only: the field again.")


class ErrorReply(BaseModel):
    """Any refusal."""

    error: ErrorBody


class Problem(Exception):
    """A refusal on its way to the caller. `status` follows from the code where it is not given."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        status: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s
        self.status = STATUSES.get(code, 500) if status is None else status
        self.headers = dict(headers or {})

    @classmethod
    def of(cls, error: TrimtabError, words: Mapping[str, str] | None = None) -> Problem:
        """What a service behind the gateway said; `words` are the caller's for the service's own fields."""
        field, message = error.field, error.message
        for own, callers in (words or {}).items():
            if field is not None and field.startswith(own):
                field = callers + field.removeprefix(own)
                message = callers + message.removeprefix(own) if message.startswith(own) else message
                break
        return cls(error.code, message, field=field, retry_after_s=error.retry_after_s)

    def body(self, request_id: str, *, like_openai: bool = False) -> dict[str, Any]:
        """The JSON of the refusal."""
        error: dict[str, Any] = {"code": self.code, "message": printable(self.message)}
        error |= {"field": self.field and printable(self.field), "request_id": request_id}
        if like_openai:
            error |= {"type": self.code.lower(), "param": error["field"]}
        return {"error": error}

    def response(self, request_id: str, *, like_openai: bool = False) -> JSONResponse:
        """The refusal as a response."""
        headers = self.headers
        if self.status == 401:
            headers = headers | {"WWW-Authenticate": "Bearer"}
        if self.retry_after_s is not None:
            headers = headers | {"Retry-After": str(math.ceil(self.retry_after_s))}
        return JSONResponse(self.body(request_id, like_openai=like_openai), self.status, headers)


async def in_callers_words(call: Awaitable[T], words: Mapping[str, str]) -> T:
    """What a service answers; where it refuses, Problem with the caller's words for the service's fields."""
    try:
        return await call
    except TrimtabError as error:
        raise Problem.of(error, words) from None


def unprocessable(field: str, message: str) -> Problem:
    """A request that does not have the documented form."""
    return Problem("INVALID_ARGUMENT", f"{field}: {message}", field=field, status=UNPROCESSABLE)


def refused(field: str, message: str) -> Problem:
    """A request of the documented form whose fields do not go together."""
    return Problem("INVALID_ARGUMENT", f"{field}: {message}", field=field)


def field_path(location: Sequence[Any]) -> str:
    """A position in a body as callers write it: ("body", "items", 0, "prompt") is "items[0].prompt".

    Names in angle brackets stand for branches of a union, which callers do not know.
    """
    path = ""
    for part in location[1:] if location and location[0] == "body" else location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not str(part).startswith("<"):
            path += f".{part}" if path else str(part)
    return path or "body"


def printable(text: str) -> str:
    """The text as UTF-8 can hold it: a caller's own lone surrogates come back escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The refusals of a route, for its OpenAPI entry."""
    return {status: {"model": ErrorReply, "description": MEANINGS[status]} for status in statuses}


MEANINGS = {
    400: "The fields do not go together, or the model refuses them; `field` says where.",
    401: "No valid credentials.",
    403: "The credentials lack the role of this route.",
    404: "No such model or version.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    422: "The request does not have the documented form; `field` says where.",
    429: "Too many requests, or a full queue; the header Retry-After says when to come again.",
    500: "The gateway or a service failed.",
    501: "The service behind the gateway does not have this.",
    503: "The service is down, loading or draining.",
    504: "The deadline passed.",
}
POSTED = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 501, 503, 504)
READ = (401, 403, 404, 422, 429, 500, 503, 504)
