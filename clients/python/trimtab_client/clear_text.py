"""Where a token may travel without TLS: on this machine, and nowhere else."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit


def is_this_machine(host: str) -> bool:
    """Whether a host is loopback: 127.0.0.0/8, ::1 or localhost; no other name is."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_token_may_travel_to(url: str) -> None:
    """ValueError unless `url` is https, or on this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not is_this_machine(parts.hostname or ""):
        raise ValueError(
            f"{url} is another machine, and a token travels there over TLS only: give its https:// address"
        )
