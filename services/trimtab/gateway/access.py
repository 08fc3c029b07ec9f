"""Who may call which route: the one table, and the check before anything of a body is read.

A path that is not in the table needs credentials like any other, and then does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers

from trimtab.gateway.config import GatewayConfig
from trimtab.gateway.problems import Problem
from trimtab.gateway.rates import RateLimiter
from trimtab.runtime.audit import AuditLog
from trimtab.runtime.auth import Authenticator, Principal, require
from trimtab.runtime.errors import ServiceError
from trimtab.runtime.roles import ANY, PUBLIC

ROLES = {
    "/v1/score": "score",
    "/v1/generate": "generate",
    "/v1/models": ANY,
    "/v1/models/{name}": ANY,
    "/v1/completions": "generate",
    "/v1/chat/completions": "generate",
    "/get_reward": "score",
    "/classify": "score",
    "/openapi.json": ANY,
    "/dashboard": "train",
    "/dashboard/events": "train",
    "/dashboard/samples": "train",
    "/dashboard/versions": "train",
    "/dashboard/people": "train",
    "/dashboard/answer": "generate",
    "/dashboard/roll-back": "admin",
}
STATIC = "/dashboard/static/{name}"
NO_CREDENTIALS = frozenset({"/healthz"})
WAY_IN = frozenset({"/dashboard/sign-in", "/dashboard/session", STATIC})
"""What a browser needs before anybody has signed in; /dashboard/session looks at the token that it is sent."""
AUDITED = {"/dashboard/roll-back": "roll back"}
"""What leaves a line in the audit log, by these words, also where a known caller may not do it."""
OPEN_TO_ALL = NO_CREDENTIALS | WAY_IN


@dataclass(frozen=True)
class Caller:
    """Who asks; `name` holds nothing secret and is what limits and logs go by."""

    name: str


def route_of(path: str) -> str | None:
    """The table's route of a path; None for one that does not exist."""
    if path in ROLES or path in OPEN_TO_ALL:
        return path
    if path.startswith("/v1/models/"):
        return "/v1/models/{name}"
    if path.startswith("/dashboard/static/"):
        return STATIC
    return None


class Gate:
    """Admits callers by credentials, role and rate."""

    def __init__(self, config: GatewayConfig, authenticator: Authenticator) -> None:
        self.audit = AuditLog(config.auth.audit_file)
        self._authenticator = authenticator
        self._rates = RateLimiter(config.requests_per_s, config.burst) if config.requests_per_s is not None else None

    @property
    def is_open(self) -> bool:
        """Whether everybody may call."""
        return self._authenticator.is_open

    async def principal(self, headers: Headers, names: Sequence[str] = ()) -> Principal:
        """Who shows these headers, and with which roles; Problem 401."""
        try:
            return await self._authenticator.admit(headers, names)
        except ServiceError as error:
            raise Problem(error.code.name, error.message, retry_after_s=error.retry_after_s) from None

    async def admit(self, route: str | None, headers: Headers, names: Sequence[str], host: str) -> Caller:
        """Who calls, from `host` and with these names in their certificate; Problem 401, 403 or 429."""
        if route in OPEN_TO_ALL:
            return Caller(PUBLIC)
        try:
            principal = await self._authenticator.admit(headers, names)
            self._require(principal, route or "", host)
        except ServiceError as error:
            raise Problem(error.code.name, error.message, retry_after_s=error.retry_after_s) from None
        return self.count(principal, host)

    def _require(self, principal: Principal, route: str, host: str) -> None:
        try:
            require(principal, ROLES.get(route, ANY))
        except ServiceError as error:
            if route in AUDITED:
                self.audit.act(who=principal.name, what=AUDITED[route], outcome=error.code.name, peer=host)
            raise

    def count(self, principal: Principal, host: str) -> Caller:
        """Count a request of this caller, on either port; Problem 429 where there were too many."""
        caller = Caller(host if self._authenticator.is_open else principal.name)
        wait_s = self._rates.wait_s(caller.name) if self._rates is not None else 0.0
        if wait_s > 0:
            raise Problem("RESOURCE_EXHAUSTED", "too many requests from this caller", retry_after_s=wait_s)
        return caller
