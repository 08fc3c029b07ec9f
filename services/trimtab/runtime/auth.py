"""Who calls, and whether they may: credentials to a `Principal`, a principal and a role to yes or no.

Credentials are a bearer token (a static key of `keys`, or a JSON Web Token of `identity_tokens`) or the names in a
client's certificate; a token counts where both are shown. Rooms over HTTP and gRPC use the same three names:

    authenticator = Authenticator(config.auth)
    principal = await authenticator.admit(headers, certificate_names)
    require(principal, "score")

Which method needs which role is `roles`' matter. Tokens are never logged and never kept but by their digest.
"""

import asyncio
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from grpc import StatusCode

from trimtab.runtime.auth_config import AuthConfig
from trimtab.runtime.errors import ServiceError, exhausted, unavailable
from trimtab.runtime.identity_tokens import (
    IdentityTokens,
    KeysUnavailableError,
    TokenRefusedError,
    looks_like_jwt,
    roles_of_name,
)
from trimtab.runtime.keys import Key, matches, read_keys, token_id
from trimtab.runtime.reloading import Reloading
from trimtab.runtime.roles import ANY, PUBLIC, ROLES

METADATA_KEY = "authorization"
UNKNOWN = "the bearer token is not known here"

# A checked token is believed so long without another check; a key taken out of its file ends at once all the same.
REMEMBER_S = 60.0
REFUSED_REMEMBER_S = 10.0
REMEMBER_TOKENS = 4096
KEYS, TOKENS = "keys", "tokens"
# Checks of one kind that may wait in line: each of a key takes some 20 ms of one thread.
LONGEST_LINE = 64

Headers = Mapping[str, str] | Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Principal:
    """A caller who is known. `name` says how: "key:…", "token:…" or "certificate:…"; it holds no secret."""

    name: str
    roles: frozenset[str]


ANYONE = Principal("anyone", ROLES)


def require(principal: Principal, role: str) -> None:
    """PERMISSION_DENIED, naming what is missing, unless the principal has the role (`ANY`: is known at all)."""
    if role != PUBLIC and role != ANY and role not in principal.roles:
        has = ", ".join(sorted(principal.roles)) or "none"
        raise ServiceError(
            StatusCode.PERMISSION_DENIED, f"{principal.name} lacks the role {role!r} that this needs; its roles: {has}"
        )


@dataclass(frozen=True)
class _Checked:
    """The outcome of one token's check: who, or why not; until when on `time.monotonic`."""

    principal: Principal | None
    refusal: str
    until_s: float
    key: Key | None = None


class Authenticator:
    """Knows callers by the credentials of one config. Thread-safe; files are read again when they change.

    StartError where a file cannot be read. With nothing configured everybody is `ANYONE`, who has every role.
    """

    def __init__(self, config: AuthConfig) -> None:
        self._config = config
        self._keys = Reloading(config.keys_file, read_keys) if config.keys_file is not None else None
        self._tokens = IdentityTokens(config.jwt)
        self._salt = os.urandom(32)
        self._lock = threading.Lock()
        self._accepted: OrderedDict[bytes, _Checked] = OrderedDict()
        self._refused: OrderedDict[bytes, _Checked] = OrderedDict()  # apart: they must not push those out
        self._threads = {kind: ThreadPoolExecutor(1, thread_name_prefix=f"check-{kind}") for kind in (KEYS, TOKENS)}
        self._in_line = dict.fromkeys(self._threads, 0)

    @property
    def is_open(self) -> bool:
        """Whether everybody may call."""
        return self._config.is_open

    def authenticate(self, headers: Headers, certificate_names: Iterable[str] = ()) -> Principal:
        """Who shows these headers (or gRPC metadata) and has these names in their certificate.

        UNAUTHENTICATED with what is missing; UNAVAILABLE while an issuer's keys cannot be read. May take tens of
        milliseconds, or seconds for an issuer's keys: on an event loop use `admit`.
        """
        if self._config.is_open:
            return ANYONE
        token = _bearer(headers)
        if token is None:
            return self._by_certificate(tuple(certificate_names))
        return self._recall(token) or self._answer(self._check(token))

    async def admit(self, headers: Headers, certificate_names: Iterable[str] = ()) -> Principal:
        """`authenticate` for event loops: at once where nothing is to be reckoned, else on a thread."""
        if self._config.is_open:
            return ANYONE
        token = _bearer(headers)
        if token is None:
            return self._by_certificate(tuple(certificate_names))
        if (known := self._recall(token)) is not None:
            return known
        kind = TOKENS if looks_like_jwt(token) else KEYS
        if self._in_line[kind] >= LONGEST_LINE:
            raise exhausted(f"{LONGEST_LINE} {kind} wait to be checked", retry_after_s=1.0)
        self._in_line[kind] += 1
        try:
            thread = self._threads[kind]
            return self._answer(await asyncio.get_running_loop().run_in_executor(thread, self._check_once, token))
        finally:
            self._in_line[kind] -= 1

    def close(self) -> None:
        """End its threads."""
        for thread in self._threads.values():
            thread.shutdown(wait=False, cancel_futures=True)

    def _recall(self, token: str) -> Principal | None:
        """The principal of a token checked lately; raises where it was refused lately or names no key; None: check."""
        checked = self._unknown(token) or self._remembered_check(token)
        return self._answer(checked) if checked is not None else None

    def _remembered_check(self, token: str) -> _Checked | None:
        keys = self._keys.get() if self._keys is not None else {}
        digest = self._digest(token)
        with self._lock:
            checked = self._accepted.get(digest) or self._refused.get(digest)
        if checked is None or checked.until_s < time.monotonic():
            return None
        if checked.key is not None and (keys.get(checked.key.id) != checked.key or checked.key.expired()):
            return None
        return checked

    def _check_once(self, token: str) -> _Checked:
        """Of several calls with one token only the first in line checks it."""
        return self._remembered_check(token) or self._check(token)

    def _check(self, token: str) -> _Checked:
        checked = self._check_jwt(token) if looks_like_jwt(token) else self._check_key(token)
        if checked.until_s > 0:
            self._remember(self._digest(token), checked)
        return checked

    def _remember(self, digest: bytes, checked: _Checked) -> None:
        remembered, other = self._accepted, self._refused
        if checked.principal is None:
            remembered, other = other, remembered
        with self._lock:
            other.pop(digest, None)
            remembered[digest] = checked
            remembered.move_to_end(digest)
            while len(remembered) > REMEMBER_TOKENS:
                remembered.popitem(last=False)

    def _unknown(self, token: str) -> _Checked | None:
        """The refusal of what names no key of here, which costs nothing; never remembered, as a key may be added."""
        if looks_like_jwt(token) or self._key_of(token) is not None:
            return None
        return _Checked(None, UNKNOWN, 0.0)

    def _key_of(self, token: str) -> Key | None:
        keys = self._keys.get() if self._keys is not None else {}
        return keys.get(token_id(token) or "")

    def _check_key(self, token: str) -> _Checked:
        key = self._key_of(token)
        if key is None:
            return _Checked(None, UNKNOWN, 0.0)
        if not matches(key, token):
            return _Checked(None, UNKNOWN, time.monotonic() + REFUSED_REMEMBER_S, key)
        if key.expired():
            return _Checked(None, f"the key {key.name} has expired; have `trimtab keys add` make a new one", 0.0)
        return _Checked(Principal(f"key:{key.name}", frozenset(key.roles)), "", time.monotonic() + REMEMBER_S, key)

    def _check_jwt(self, token: str) -> _Checked:
        if not self._config.jwt:
            return _Checked(None, "no issuer of JSON Web Tokens is believed here", 0.0)
        try:
            identity = self._tokens.check(token)
        except TokenRefusedError as error:
            return _Checked(None, str(error), 0.0)
        except KeysUnavailableError as error:
            raise unavailable(str(error), retry_after_s=5.0) from error
        left_s = min(identity.expires_s - time.time(), REMEMBER_S)
        return _Checked(Principal(f"token:{identity.name}", identity.roles), "", time.monotonic() + left_s)

    def _answer(self, checked: _Checked) -> Principal:
        if checked.principal is None:
            raise ServiceError(StatusCode.UNAUTHENTICATED, checked.refusal)
        return checked.principal

    def _by_certificate(self, names: tuple[str, ...]) -> Principal:
        table = self._config.certificates
        known = [name for name in names if roles_of_name(name, table)]
        if known:
            roles = frozenset[str]().union(*(roles_of_name(name, table) for name in known))
            return Principal(f"certificate:{known[0]}", roles)
        raise ServiceError(StatusCode.UNAUTHENTICATED, self._wanted(names))

    def _wanted(self, names: tuple[str, ...]) -> str:
        ways = ["a key (authorization: Bearer tt_…)"] if self._config.keys_file is not None else []
        ways += [f"a token of {issuer.issuer}" for issuer in self._config.jwt]
        ways += ["a client certificate with a name that has roles here"] if self._config.certificates else []
        shown = f"; the certificate's names {', '.join(names)} have none" if names and self._config.certificates else ""
        return f"this server wants {' or '.join(ways)}{shown}"

    def _digest(self, token: str) -> bytes:
        """Tokens are remembered by a salted digest: neither memory nor the time of a look-up tells them."""
        return hashlib.blake2b(token.encode(), key=self._salt, digest_size=32).digest()


def _bearer(headers: Headers) -> str | None:
    """The bearer token in headers or metadata; UNAUTHENTICATED for another scheme."""
    pairs: Any = headers.items() if isinstance(headers, Mapping) else headers
    given = next((value for key, value in pairs if key.lower() == METADATA_KEY), None)
    if given is None:
        return None
    scheme, _, token = (given if isinstance(given, str) else given.decode("latin-1")).partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise ServiceError(StatusCode.UNAUTHENTICATED, "authorization: write `Bearer` and the token")
    return token.strip()
