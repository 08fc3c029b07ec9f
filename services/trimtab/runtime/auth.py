"""Bearer tokens with roles, read from one file; health and reflection need none.

Each line of the file is a token and, behind a space, the roles it has, separated by commas (none: every role); `#`
starts a comment. The file is read again when it changes, so a token is revoked without a restart. Tokens are
secrets: they are never logged and travel over TLS or loopback only (`config` refuses anything else).
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from grpc import StatusCode

from trimtab.runtime.errors import ServiceError, StartError
from trimtab.runtime.logs import get_logger

log = get_logger(__name__)

ROLES = frozenset({"score", "generate", "logprobs", "train", "admin"})
METADATA_KEY = "authorization"
_SERVICE_ROLES = {
    "trimtab.v1.RewardService": "score",
    "trimtab.v1.GeneratorService": "generate",
    "trimtab.v1.ReferenceService": "logprobs",
    "trimtab.v1.TrainerService": "train",
}


class TokenFile:
    """The tokens of one file. StartError where it cannot be read or is malformed at start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._stat()
        self._roles = _parse(path)

    def refusal(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> ServiceError | None:
        """Why a call of "/service/Method" is not allowed (UNAUTHENTICATED, PERMISSION_DENIED), or None where it is."""
        self._reload()
        given = next((value for key, value in metadata if key == METADATA_KEY), "")
        scheme, _, token = (given if isinstance(given, str) else "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            return ServiceError(StatusCode.UNAUTHENTICATED, "this server wants a bearer token")
        roles = self._roles.get(_digest(token.strip()))
        if roles is None:
            return ServiceError(StatusCode.UNAUTHENTICATED, "the bearer token is not known here")
        needed = needed_role(method)
        if needed is not None and needed not in roles:
            return ServiceError(StatusCode.PERMISSION_DENIED, f"the token lacks the role {needed!r}")
        return None

    def _reload(self) -> None:
        try:
            stamp = self._stat()
            if stamp != self._stamp:
                self._roles = _parse(self._path)
                self._stamp = stamp
                log.info("tokens reloaded", path=str(self._path), count=len(self._roles))
        except StartError as error:
            log.error("keeping the old tokens", reason=str(error))

    def _stat(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError as error:
            raise StartError(f"token_file: cannot read {self._path}: {error.strerror}") from None
        return found.st_mtime_ns, found.st_size, found.st_ino


def needed_role(method: str) -> str | None:
    """The role of a call; None: any token will do (GetModel)."""
    _, service, name = method.split("/")
    if service == "trimtab.v1.ModelService":
        return "admin" if name == "LoadVersion" else None
    return _SERVICE_ROLES.get(service, "admin")


def _parse(path: Path) -> dict[bytes, frozenset[str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"token_file: cannot read {path}: {error}") from None
    found: dict[bytes, frozenset[str]] = {}
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        roles = frozenset(words[1].split(",")) if len(words) > 1 else ROLES
        if len(words) > 2 or not roles <= ROLES:
            raise StartError(f"token_file: {path} line {number}: write TOKEN ROLE,ROLE with roles of {sorted(ROLES)}")
        found[_digest(words[0])] = roles
    if not found:
        raise StartError(f"token_file: {path} holds no token")
    return found


def _digest(token: str) -> bytes:
    """Tokens are kept and looked up by digest, so that the time of a look-up says nothing about them."""
    return hashlib.sha256(token.encode()).digest()
