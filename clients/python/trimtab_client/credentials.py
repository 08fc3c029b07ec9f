"""Credentials that change while a client lives: renewed certificates and rotated tokens, read when files change."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from trimtab_client.channel import ChannelOptions, Tls, check_token_may_travel

LOOK_EVERY_S = 1.0

Stamp = tuple[int, int, int] | None


class Files:
    """Some files; `changed` says whether one of them was written or replaced since `accept`. Thread-safe."""

    def __init__(self, paths: Sequence[Path | str | None]) -> None:
        self._paths = [Path(path) for path in paths if path is not None]
        self._stamps = self._look()
        self._seen: list[Stamp] = self._stamps
        self._next_look_s = time.monotonic() + LOOK_EVERY_S
        self._lock = threading.Lock()

    def changed(self) -> bool:
        """Looks at most once in `LOOK_EVERY_S`; a change is told once per look until it is accepted."""
        if not self._paths or time.monotonic() < self._next_look_s:
            return False
        with self._lock:
            self._next_look_s = time.monotonic() + LOOK_EVERY_S
            self._seen = self._look()
            return self._seen != self._stamps and None not in self._seen

    def accept(self) -> None:
        """What was seen last is in use now."""
        self._stamps = self._seen

    def _look(self) -> list[Stamp]:
        return [_stamp(path) for path in self._paths]


class Bearer:
    """The bearer token of a client as call metadata, read again when its file changes.

    ValueError where it would travel in the clear to another machine or its file is empty; OSError for no file.
    """

    def __init__(self, options: ChannelOptions, addresses: Sequence[str]) -> None:
        check_token_may_travel(options, addresses)
        self._path = None if options.token_file is None else Path(options.token_file)
        self._files = Files([self._path])
        self._metadata = _as_metadata(options.token if self._path is None else _read(self._path))

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with a call that starts now."""
        if self._path is not None and self._files.changed():
            try:
                self._metadata = _as_metadata(_read(self._path))
                self._files.accept()
            except (OSError, ValueError):  # it is being replaced: the old one is shown until the next look
                return self._metadata
        return self._metadata


def is_whole(tls: Tls) -> bool:
    """Whether the files are there and the certificate and key belong together: not so amid a renewal."""
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if tls.ca is not None:
            context.load_verify_locations(tls.ca)
        if tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key)
    except (OSError, ssl.SSLError):
        return False
    return True


def _as_metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    return () if token is None else (("authorization", f"Bearer {token}"),)


def _read(path: Path) -> str:
    token = path.read_text(encoding="utf-8").strip()
    if not token or not token.isascii() or not token.isprintable():
        raise ValueError(f"token_file: {path} holds no token")
    return token


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
