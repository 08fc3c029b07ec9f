"""Between a browser and the guard: the cookie as credentials, the pages' security policy, the way to the sign-in.

A browser cannot show a bearer token when it opens a page, so signing in puts the token into a cookie that scripts
cannot read and other sites cannot send (SameSite=Strict), and that is sent to the dashboard alone.
"""

from __future__ import annotations

from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "trimtab_dashboard"
PREFIX = "/dashboard"
SIGN_IN = f"{PREFIX}/sign-in"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


class Door:
    """ASGI middleware around the guard; other paths than the dashboard's pass through untouched."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not (scope["path"] == PREFIX or scope["path"].startswith(f"{PREFIX}/")):
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        opened = scope["method"] == "GET" and "text/html" in headers.get("accept", "")
        turned_away = False

        async def from_here(message: Message) -> None:
            nonlocal turned_away
            if message["type"] == "http.response.start":
                turned_away = opened and message["status"] == 401
                answer = MutableHeaders(raw=message.setdefault("headers", []))
                answer["content-security-policy"] = POLICY
                if turned_away:
                    message = {**message, "status": 303}
                    answer["location"] = SIGN_IN
                    answer["content-length"] = "0"
            elif turned_away:
                message = {"type": "http.response.body", "body": b"", "more_body": False}
            await send(message)

        await self._app(_with_credentials(scope, headers), receive, from_here)


def _with_credentials(scope: Scope, headers: Headers) -> Scope:
    token = token_in(headers)
    if token is None or "authorization" in headers:
        return scope
    return {**scope, "headers": [*scope["headers"], (b"authorization", f"Bearer {token}".encode())]}


def token_in(headers: Headers) -> str | None:
    """The token that a browser has signed in with."""
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return morsel.value if morsel is not None and morsel.value.isascii() and morsel.value else None
