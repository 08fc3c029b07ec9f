"""Static keys of callers: a YAML file of names, roles and hashes. The secrets themselves are kept nowhere.

A token is `tt_ID_SECRET`. The id finds the entry, so that an unknown token costs nothing; the secret is checked
against an Argon2 hash, which costs some 20 ms: `auth` remembers what was checked. `trimtab keys` writes these files; a
server reads one again when it changes.
"""

import fcntl
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import yaml
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from trimtab.runtime.auth_config import Roles
from trimtab.runtime.errors import StartError
from trimtab.runtime.roles import ROLES

TOKEN = re.compile(r"tt_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
HEADER = "# Keys of callers, written by `trimtab keys`. Hashes only: a lost token is replaced, never found again.\n"


class KeyFileError(StartError):
    """A file of keys cannot be read, or a change to it makes no sense; the message says what to do."""


class Key(BaseModel):
    """One caller's key as it is kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{12}$")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,99}$")
    roles: Roles = Field(min_length=1)
    hash: str = Field(pattern=r"^\$argon2id\$", repr=False)
    created: AwareDatetime
    expires: AwareDatetime | None = None

    def expired(self, now: datetime | None = None) -> bool:
        """Whether it has ended."""
        return self.expires is not None and self.expires <= (now or datetime.now(UTC))


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: tuple[Key, ...] = ()


def token_id(token: str) -> str | None:
    """The id in a token, or None for what is no token of ours."""
    found = TOKEN.fullmatch(token)
    return found.group(1) if found else None


def matches(key: Key, token: str) -> bool:
    """Whether the token is this key's; takes some 20 ms and 19 MiB."""
    from argon2 import PasswordHasher
    from argon2.exceptions import InvalidHashError, VerificationError

    found = TOKEN.fullmatch(token)
    if found is None or found.group(1) != key.id:
        return False
    try:
        return PasswordHasher().verify(key.hash, found.group(2))
    except (VerificationError, InvalidHashError):
        return False


def read_keys(path: Path) -> dict[str, Key]:
    """The keys of a file by id; KeyFileError where it cannot be read or is malformed. Its content is never quoted."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise KeyFileError(f"keys_file: cannot read {path}: {error.strerror}; `trimtab keys add` makes one") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise KeyFileError(f"keys_file: {path} is not YAML as `trimtab keys` writes it") from None
    try:
        keys = _Content.model_validate(content if content is not None else {}).keys
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "its content"
        raise KeyFileError(f"keys_file: {path}: {where}: {error.errors()[0]['msg']}") from None
    return {key.id: key for key in keys}


def add_key(path: Path, name: str, roles: Iterable[str], *, expires: datetime | None = None) -> tuple[Key, str]:
    """Put a new key into the file, which is made where there is none; the key, and its token, shown only now.

    KeyFileError for an unknown role or a name that is taken or malformed.
    """
    wanted = tuple(dict.fromkeys(roles))
    unknown = sorted(set(wanted) - ROLES)
    if unknown or not wanted:
        raise KeyFileError(f"role: {', '.join(unknown) or 'none given'}; there are {', '.join(sorted(ROLES))}")
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    try:
        key = Key.model_validate(
            {
                "id": key_id,
                "name": name,
                "roles": wanted,
                "hash": _hash(secret),
                "created": datetime.now(UTC).replace(microsecond=0),
                "expires": expires,
            }
        )
    except ValidationError:
        raise KeyFileError(f"name: {name!r}: use letters, digits and . _ @ - (100 at most)") from None
    with _changing(path) as keys:
        if any(other.name == name and not other.expired() for other in keys.values()):
            raise KeyFileError(f"name: there is a key named {name} in {path}; revoke it first, or take another name")
        keys[key_id] = key
    return key, f"tt_{key_id}_{secret}"


def revoke_key(path: Path, which: str) -> list[Key]:
    """Take out the keys of this id or name; servers refuse them from their next call on. KeyFileError for none."""
    read_keys(path)
    with _changing(path) as keys:
        gone = [key for key in keys.values() if which in (key.id, key.name)]
        if not gone:
            raise KeyFileError(f"key: {path} holds no key with the id or name {which}")
        for key in gone:
            del keys[key.id]
    return gone


def _hash(secret: str) -> str:
    from argon2 import PasswordHasher

    # OWASP's smallest setting: the secret is 256 random bits, so memory is what a server must be spared.
    return PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1).hash(secret)


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, Key]]:
    """The keys of the file, written back whole at the end; one change at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = read_keys(path) if path.exists() else {}
        yield keys
        content = _Content(keys=tuple(keys.values())).model_dump(mode="json")
        partial = path.with_name(f".{path.name}.partial")
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(HEADER + yaml.safe_dump(content, sort_keys=False, width=200))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
