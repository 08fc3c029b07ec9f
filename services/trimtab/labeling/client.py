"""A client of the labeling server's REST API, for rounds and scripts. Only the standard library; no database."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

from trimtab.labeling.errors import ConflictError, LabelingError

NDJSON = "application/x-ndjson"


class UnreachableError(LabelingError):
    """The labeling server does not answer, or cannot work now: ask again later."""


class RefusedError(LabelingError):
    """The labeling server refused a call; the message is its own."""


class LabelingClient:
    """Calls of one server with one person's access token. Each raises UnreachableError or RefusedError.

    Args:
        address: "http://host:port".
    """

    def __init__(self, address: str, token: str, *, timeout_s: float = 60.0) -> None:
        self.address = address.rstrip("/")
        self._token = token
        self._timeout_s = timeout_s

    def create_campaign(self, plan: Mapping[str, Any]) -> None:
        """Make a campaign of the fields that the API names. ConflictError where the name is taken."""
        self._call("POST", "/campaigns", json.dumps(plan).encode(), "application/json")

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
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise _refusal(self.address, error) from None
        except OSError as error:
            raise UnreachableError(f"{self.address} does not answer: {getattr(error, 'reason', error)}") from None


def _refusal(address: str, error: urllib.error.HTTPError) -> LabelingError:
    try:
        message = str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {error.code}"
    if error.code >= 500:
        return UnreachableError(f"{address}: {message}")
    return ConflictError(message) if error.code == 409 else RefusedError(f"{address}: {message}")
