"""A client of the labeling server's REST API: campaigns, their tasks, what people judged. Only the standard library."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from trimtab_client.clear_text import check_token_may_travel_to
from trimtab_client.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    TrimtabError,
    Unauthenticated,
    Unavailable,
)

NDJSON = "application/x-ndjson"
ERRORS: dict[int, tuple[type[TrimtabError], str]] = {
    401: (Unauthenticated, "UNAUTHENTICATED"),
    403: (PermissionDenied, "PERMISSION_DENIED"),
    404: (NotFound, "NOT_FOUND"),
    409: (AlreadyExists, "ALREADY_EXISTS"),
    422: (InvalidArgument, "INVALID_ARGUMENT"),
}


class LabelingClient:
    """Calls of one server with one person's access token.

    Each raises a TrimtabError: Unavailable where the server does not answer or cannot work now (ask again later),
    AlreadyExists, NotFound, InvalidArgument and so on where it refuses, with its own words.

    Args:
        address: "https://host:port", or on this machine "http://host:port"; ValueError where the token would travel in
            the clear to another one.
        timeout_s: of each call.
        ca_file: PEM authorities to believe instead of the system's.
    """

    def __init__(self, address: str, token: str, *, timeout_s: float = 60.0, ca_file: Path | None = None) -> None:
        try:
            check_token_may_travel_to(address)
        except ValueError as error:
            raise ValueError(f"address: {error}") from None
        self.address: str = address.rstrip("/")
        self._token: str = token
        self._timeout_s: float = timeout_s
        self._opener: urllib.request.OpenerDirector = _opener(self.address, ca_file)

    def create_campaign(self, plan: Mapping[str, Any]) -> None:
        """Make a campaign of the fields that the API names. AlreadyExists where the name is taken."""
        self._call("POST", "/campaigns", json.dumps(plan).encode(), "application/json")

    def campaigns(self) -> list[dict[str, Any]]:
        """All campaigns, the newest first."""
        return self._json("GET", "/campaigns")

    def campaign(self, name: str) -> dict[str, Any]:
        """A campaign's settings and state."""
        return self._json("GET", f"/campaigns/{quote(name)}")

    def progress(self, name: str) -> dict[str, int]:
        """The state of a campaign's queue."""
        return self._json("GET", f"/campaigns/{quote(name)}/progress")

    def add_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
        """Import rows; the same again adds nothing."""
        body = "\n".join(json.dumps(row) for row in rows).encode()
        return json.loads(self._call("POST", f"/campaigns/{quote(name)}/rows", body, NDJSON))

    def rows(self, name: str, *, resolve: bool = False) -> list[dict[str, Any]]:
        """Export all judgments; with `resolve` only the decision where a lead decided."""
        text = self._call("GET", f"/campaigns/{quote(name)}/rows?resolve={str(resolve).lower()}").decode()
        return [json.loads(line) for line in text.split("\n") if line]

    def win_rates(self, name: str) -> list[dict[str, Any]]:
        """Which versions people prefer."""
        return self._json("GET", f"/campaigns/{quote(name)}/win-rates")

    def _json(self, method: str, path: str) -> Any:
        return json.loads(self._call(method, path))

    def _call(self, method: str, path: str, body: bytes | None = None, content_type: str = "") -> bytes:
        headers = {"authorization": f"Bearer {self._token}", "accept": "application/json"}
        if body is not None:
            headers["content-type"] = content_type
        request = urllib.request.Request(f"{self.address}/api/v1{path}", body, headers, method=method)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise _refusal(self.address, error) from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise Unavailable("UNAVAILABLE", f"{self.address} does not answer: {reason}") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take the token along, wherever it leads: it is an error like any other."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _opener(address: str, ca_file: Path | None) -> urllib.request.OpenerDirector:
    """Opens what is on this machine without TLS by no proxy, which would read the token; a tunnel for TLS cannot."""
    if not address.startswith("https:"):
        return urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))
    context = ssl.create_default_context(cafile=ca_file)
    return urllib.request.build_opener(_NoRedirects, urllib.request.HTTPSHandler(context=context))


def _refusal(address: str, error: urllib.error.HTTPError) -> TrimtabError:
    try:
        message = str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {error.code}"
    if error.code >= 500:
        return Unavailable("UNAVAILABLE", f"{address}: {message}")
    kind, code = ERRORS.get(error.code, (FailedPrecondition, "FAILED_PRECONDITION"))
    return kind(code, f"{address}: {message}")
