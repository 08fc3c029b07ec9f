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
        address: "http://host:port" or "https://host:port".
        timeout_s: of each call.
        ca_file: PEM authorities to believe instead of the system's.
    """

    def __init__(self, address: str, token: str, *, timeout_s: float = 60.0, ca_file: Path | None = None) -> None:
        self.address: str = address.rstrip("/")
        self._token: str = token
        self._timeout_s: float = timeout_s
        self._tls: ssl.SSLContext | None = (
            ssl.create_default_context(cafile=ca_file) if self.address.startswith("https:") else None
        )

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
            with urllib.request.urlopen(request, timeout=self._timeout_s, context=self._tls) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise _refusal(self.address, error) from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise Unavailable("UNAVAILABLE", f"{self.address} does not answer: {reason}") from None


def _refusal(address: str, error: urllib.error.HTTPError) -> TrimtabError:
    try:
        message = str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {error.code}"
    if error.code >= 500:
        return Unavailable("UNAVAILABLE", f"{address}: {message}")
    kind, code = ERRORS.get(error.code, (FailedPrecondition, "FAILED_PRECONDITION"))
    return kind(code, f"{address}: {message}")
