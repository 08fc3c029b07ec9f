"""JSON Web Tokens of OIDC providers and Kubernetes ServiceAccounts, checked by their issuers' key sets (JWKS).

Signature, issuer, audience and times are PyJWT's work; here is where keys come from and what roles a token has.
"""

import json
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from trimtab.runtime.auth_config import JwtIssuer
from trimtab.runtime.errors import StartError
from trimtab.runtime.logs import get_logger
from trimtab.runtime.roles import ROLES

log = get_logger(__name__)

# Public keys only: with a shared secret, whoever can check a token could make one.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
FETCH_TIMEOUT_S = 5.0
MOST_BYTES = 1 << 20
# A token with an unknown key id has the set read anew, but no oftener than this.
SHORTEST_PAUSE_S = 10.0


class TokenRefusedError(Exception):
    """The token is not to be believed; the message says why and quotes nothing of it."""


class KeysUnavailableError(Exception):
    """The issuer's keys cannot be had now; another time the same token may pass."""


@dataclass(frozen=True)
class Identity:
    """Who a token stands for, with which roles, until when (seconds since the epoch)."""

    name: str
    roles: frozenset[str]
    expires_s: float


class KeySet:
    """The keys of one issuer, by key id, read from a file or address and kept for `cache_s`."""

    def __init__(self, issuer: JwtIssuer) -> None:
        self._issuer = issuer
        self._lock = threading.Lock()
        self._keys: dict[str | None, Any] = {}
        self._read_s = self._tried_s = float("-inf")
        if self._path is not None:
            self._keys, self._read_s = _parse(_read_file(self._path), issuer), time.monotonic()

    @property
    def _path(self) -> Path | None:
        return None if self._issuer.jwks.startswith("https://") else Path(self._issuer.jwks)

    def key(self, key_id: str | None) -> Any:
        """The PyJWK of that id (of an only key where the token names none); TokenRefusedError, KeysUnavailableError."""
        with self._lock:
            now_s = time.monotonic()
            stale = now_s - self._read_s > self._issuer.cache_s
            if (stale or self._find(key_id) is None) and now_s - self._tried_s > SHORTEST_PAUSE_S:
                self._tried_s = now_s
                self._refresh(now_s)
            found = self._find(key_id)
            if found is None and not self._keys:
                raise KeysUnavailableError(f"the keys of {self._issuer.issuer} cannot be read now")
            if found is None:
                raise TokenRefusedError(f"the token is signed with a key that {self._issuer.issuer} does not list")
            return found

    def _find(self, key_id: str | None) -> Any:
        if key_id is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(key_id)

    def _refresh(self, now_s: float) -> None:
        try:
            content = _read_file(self._path) if self._path is not None else _fetch(self._issuer)
            self._keys, self._read_s = _parse(content, self._issuer), now_s
        except (StartError, OSError, ValueError) as error:  # what was read before goes on being used
            log.error(
                "cannot read an issuer's keys", issuer=self._issuer.issuer, jwks=self._issuer.jwks, reason=str(error)
            )


class IdentityTokens:
    """Checks tokens of the configured issuers. StartError for a key set file that cannot be read."""

    def __init__(self, issuers: tuple[JwtIssuer, ...]) -> None:
        self._issuers: Mapping[str, tuple[JwtIssuer, KeySet]] = {
            issuer.issuer: (issuer, KeySet(issuer)) for issuer in issuers
        }

    def check(self, token: str) -> Identity:
        """Who the token stands for; TokenRefusedError, KeysUnavailableError. May read the issuer's keys: seconds."""
        import jwt

        try:
            header = jwt.get_unverified_header(token)
            named = jwt.decode(token, options={"verify_signature": False}).get("iss")
            if not isinstance(named, str) or named not in self._issuers:
                raise TokenRefusedError("the token's issuer is not believed here")
            issuer, keys = self._issuers[named]
            if header.get("alg") not in ALGORITHMS:
                raise TokenRefusedError("the token is not signed with a public key's algorithm")
            checked = jwt.decode(
                token,
                keys.key(header.get("kid")),
                algorithms=ALGORITHMS,
                audience=issuer.audience,
                issuer=issuer.issuer,
                leeway=issuer.leeway_s,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError:
            raise TokenRefusedError("the token has expired; get a new one from its issuer") from None
        except jwt.ImmatureSignatureError:
            raise TokenRefusedError("the token is not valid yet; compare the clocks") from None
        except jwt.InvalidAudienceError:
            raise TokenRefusedError("the token is for another audience, not for this service's") from None
        except jwt.MissingRequiredClaimError as error:
            raise TokenRefusedError(f"the token has no claim {error.claim!r}") from None
        except jwt.InvalidTokenError:
            raise TokenRefusedError("the token is malformed or its signature is wrong") from None
        return Identity(str(checked["sub"]), _roles(checked, issuer), float(checked["exp"]) + issuer.leeway_s)


def looks_like_jwt(token: str) -> bool:
    """Whether it has a JSON Web Token's three parts."""
    return token.count(".") == 2 and token.startswith("ey")


def roles_of_name(name: str, table: Mapping[str, tuple[str, ...]]) -> frozenset[str]:
    """The roles of every pattern that the name fits; * in a pattern stands for any letters."""
    return frozenset(role for pattern, roles in table.items() if _fits(name, pattern) for role in roles)


def _fits(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern.replace("[", "[[]").replace("?", "[?]"))


def _roles(claims: Mapping[str, Any], issuer: JwtIssuer) -> frozenset[str]:
    named: Any = claims
    for part in issuer.roles_claim.split(".") if issuer.roles_claim else ():
        named = named.get(part) if isinstance(named, Mapping) else None
    words = named.split() if isinstance(named, str) else named if isinstance(named, list) else ()
    return roles_of_name(str(claims["sub"]), issuer.subjects) | (ROLES & {str(word) for word in words})


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartError(f"auth.jwt.jwks: cannot read {path}: {error.strerror}") from None


def _fetch(issuer: JwtIssuer) -> bytes:
    headers = {"Accept": "application/json"}
    if issuer.jwks_token_file is not None:
        headers["Authorization"] = f"Bearer {issuer.jwks_token_file.read_text().strip()}"
    context = ssl.create_default_context(cafile=str(issuer.jwks_ca) if issuer.jwks_ca else None)
    request = urllib.request.Request(issuer.jwks, headers=headers)
    opener = urllib.request.build_opener(_NoRedirect, urllib.request.HTTPSHandler(context=context))
    with opener.open(request, timeout=FETCH_TIMEOUT_S) as answer:
        return answer.read(MOST_BYTES)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key set is read where the config says, and the token shown there goes nowhere else."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:
        return None


def _parse(content: bytes, issuer: JwtIssuer) -> dict[str | None, Any]:
    import jwt

    try:
        entries = json.loads(content)["keys"]
        keys: dict[str | None, Any] = {}
        for entry in entries:
            if entry.get("kty") in ("RSA", "EC", "OKP") and entry.get("use", "sig") == "sig":
                keys[entry.get("kid")] = jwt.PyJWK(entry)
    except (ValueError, KeyError, TypeError, AttributeError, jwt.PyJWTError) as error:
        raise StartError(f"auth.jwt.jwks: {issuer.jwks} is not a key set: {type(error).__name__}") from None
    if not keys:
        raise StartError(f"auth.jwt.jwks: {issuer.jwks} holds no public signing key")
    return keys
