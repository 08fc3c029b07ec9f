"""A cluster's DNS for a headless Service: one name, the addresses of its ready pods, told as late as caches tell it."""

from __future__ import annotations

import socket
import struct
import threading
import time
from types import TracebackType

A, IN = 1, 1


class Names:
    """A DNS server on a free UDP port that answers every name with `addresses`, `stale_s` after they were set."""

    def __init__(self, host: str, stale_s: float) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self._stale_s = stale_s
        self._told: list[tuple[float, list[str]]] = [(0.0, [])]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Names:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def target(self, port: int) -> str:
        """What a client dials: the name "reward", asked of this server."""
        host, own = self._socket.getsockname()
        return f"dns://{host}:{own}/reward.trimtab.svc:{port}"

    def set(self, addresses: list[str], *, at_once: bool = False) -> None:
        """Tell these addresses, once the caches have forgotten what was told before."""
        moment = time.monotonic() + (0.0 if at_once else self._stale_s)
        self._told = [*self._told, (moment, list(addresses))]

    def _serve(self) -> None:
        while True:
            try:
                query, asker = self._socket.recvfrom(4096)
                self._socket.sendto(self._answer(query), asker)
            except OSError:
                return

    def _answer(self, query: bytes) -> bytes:
        end = query.index(b"\0", 12) + 5  # the name's labels, type and class
        question = query[12:end]
        (kind,) = struct.unpack("!H", question[-4:-2])
        now = time.monotonic()
        addresses = next(addresses for moment, addresses in reversed(self._told) if moment <= now)
        found = addresses if kind == A else []
        header = query[:2] + struct.pack("!HHHHH", 0x8580, 1, len(found), 0, 0)
        record = struct.pack("!HHHLH", 0xC00C, A, IN, 1, 4)  # the name again, one second, four bytes
        return header + question + b"".join(record + socket.inet_aton(address) for address in found)
