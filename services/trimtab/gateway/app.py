"""The HTTP application: routes, what surrounds each request, refusals as JSON, the OpenAPI description."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from trimtab import __version__
from trimtab.gateway import dashboard, generation, listing, scoring
from trimtab.gateway.access import Gate
from trimtab.gateway.dialects import openai_chat, openai_completions, openrlhf, vllm
from trimtab.gateway.guard import Guard, like_openai, visit_of
from trimtab.gateway.problems import CODES, Problem, field_path, unprocessable
from trimtab.gateway.room import Room
from trimtab.runtime.metrics import Metrics
from trimtab_client import TrimtabError

DESCRIPTION = """\
Scores of a reward model and completions of a policy over HTTP.

Every request may name a deadline in the header `x-timeout-s` and an id in `x-request-id`; the id comes back in the
answer and stands in the gateway's log. Refusals are JSON: `error.code` is the canonical gRPC code, `error.field` the
field that is wrong. Credentials are a bearer token in the header `authorization`.
"""


def create_app(room: Room, gate: Gate, metrics: Metrics) -> FastAPI:
    """The application over one room."""
    app = FastAPI(
        title="trimtab gateway",
        version=__version__,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )
    app.state.room = room
    app.add_middleware(Guard, config=room.config, gate=gate, metrics=metrics)
    dashboard.add_to(app, room, gate)
    for module in (scoring, generation, listing, openai_completions, openai_chat, vllm, openrlhf):
        app.include_router(module.router)

    @app.get("/healthz", include_in_schema=False)
    async def healthy() -> dict[str, str]:
        return {"status": "serving"}

    app.add_exception_handler(Problem, _refuse)
    app.add_exception_handler(TrimtabError, _refuse_as_upstream)
    app.add_exception_handler(RequestValidationError, _refuse_form)
    app.add_exception_handler(HTTPException, _refuse_http)
    return app


def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response(visit_of(request).request_id, like_openai=like_openai(request.url.path))


def _refuse_as_upstream(request: Request, error: Exception) -> Response:
    assert isinstance(error, TrimtabError)
    return _refuse(request, Problem.of(error))


def _refuse_form(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0])
    if first["type"] == "json_invalid":
        return _refuse(request, unprocessable("body", f"is not JSON: {first['ctx']['error']}"))
    return _refuse(request, unprocessable(field_path(first["loc"]), str(first["msg"])))


def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # FastAPI could not read the body at all
        return _refuse(request, unprocessable("body", "cannot be read as JSON in UTF-8"))
    code = CODES.get(error.status_code, "INVALID_ARGUMENT")
    problem = Problem(code, str(error.detail), status=error.status_code, headers=dict(error.headers or {}))
    return _refuse(request, problem)
