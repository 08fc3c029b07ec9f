"""The web application: routes, security headers, errors as pages or JSON, static files."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from sqlalchemy import text
from sqlalchemy.exc import DataError, IntegrityError
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimtab import __version__
from trimtab.labeling.errors import ConflictError, InvalidError, LabelingError, UnauthenticatedError
from trimtab.labeling.web import api, entrance, lead_pages, people_pages, work_pages
from trimtab.labeling.web.pages import STATIC, page, static_digest
from trimtab.labeling.web.room import Room, Visit, visit

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
API = "/api/"


class Guard:
    """Puts the security headers on each response and refuses bodies that are too large."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, tls: bool) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        headers = HEADERS | ({"Strict-Transport-Security": "max-age=31536000"} if tls else {})
        self._headers = [(name.lower().encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_static = scope["path"].startswith("/static/")
        caching = b"public, max-age=31536000, immutable" if is_static else b"no-store"

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self._headers, (b"cache-control", caching)]
            await send(message)

        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, f"at most {self._max_body_bytes:,} bytes")
            return message

        await self._app(scope, limited, guarded)


def create_app(room: Room) -> FastAPI:
    """The application over one room. It holds no state of its own; several processes may serve one database."""
    app = FastAPI(
        title="trimtab labeling",
        version=__version__,
        summary="Campaigns, tasks, rankings: everything that the pages do, for programs.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/api/v1/openapi.json",
    )
    app.state.room = room
    app.add_middleware(Guard, max_body_bytes=room.config.max_upload_bytes, tls=room.config.has_tls)
    for router in (entrance.router, work_pages.router, lead_pages.router, people_pages.router, api.router):
        app.include_router(router)
    app.mount(f"/static/{static_digest()}", StaticFiles(directory=STATIC), name="static")

    @app.get("/healthz", include_in_schema=False)
    def healthy() -> dict[str, str]:
        with room.database.read() as session:
            session.execute(text("SELECT 1"))
        return {"status": "serving"}

    app.add_exception_handler(LabelingError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_http)
    app.add_exception_handler(RequestValidationError, _refuse_request)
    app.add_exception_handler(IntegrityError, _refuse_race)
    for unkept in (UnicodeEncodeError, OverflowError, DataError):
        app.add_exception_handler(unkept, _refuse_unkept)
    return app


def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, LabelingError)
    if _for_program(request):
        field = error.field if isinstance(error, InvalidError) else ""
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return JSONResponse(_problem(str(error), field or _whole(error.status)), error.status, headers)
    if isinstance(error, UnauthenticatedError):
        return RedirectResponse(f"/sign-in?next={request.url.path if request.method == 'GET' else '/'}", 303)
    return _error_page(request, error.status, str(error))


def _refuse_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if _for_program(request):
        return JSONResponse(_problem(str(error.detail), _whole(error.status_code)), error.status_code)
    return _error_page(request, error.status_code, str(error.detail))


def _refuse_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first: dict[str, Any] = dict(error.errors()[0])
    field = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path")) or "body"
    if _for_program(request):
        return JSONResponse(_problem(f"{field}: {first['msg']}", field), 422)
    return _error_page(request, 422, f"{field}: {first['msg']}")


def _refuse_race(request: Request, error: Exception) -> Response:
    """Two requests made the same thing at the same moment; the second one asks again and finds it there."""
    return _refuse(request, ConflictError("somebody did the same at this moment: try again"))


def _refuse_unkept(request: Request, error: Exception) -> Response:
    """What no column holds: half a surrogate pair, a zero character in PostgreSQL, an integer of more than 64 bits."""
    return _refuse(request, InvalidError("body", f"holds a value that cannot be kept ({type(error).__name__})"))


def _whole(status: int) -> str:
    """The field of a refusal that names none: the body where the body is at fault."""
    return "body" if status in (400, 422) else ""


def _problem(message: str, field: str = "") -> dict[str, Any]:
    return {"error": {"message": message, "field": field}}


def _for_program(request: Request) -> bool:
    return request.url.path.startswith(API) or "application/json" in request.headers.get("accept", "")


def _error_page(request: Request, status: int, message: str) -> HTMLResponse:
    visiting: Visit | None
    try:
        visiting = visit(request)
    except LabelingError:
        visiting = None
    return page(request, "error.html", visiting, status=status, code=status, message=message)
