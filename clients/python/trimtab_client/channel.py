"""Addresses, TLS, tokens and message sizes: how channels are opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from trimtab_client.clear_text import is_this_machine

Addresses = str | Sequence[str]
# A name's addresses are asked for again whenever a connection ends, but no sooner than after so long.
LOOKUP_S = 5.0
_SCHEMES = ("unix:", "dns:", "ipv4:", "ipv6:")


@dataclass(frozen=True)
class Tls:
    """PEM files: `ca` checks the server (the system's authorities if None), `cert` and `key` identify the client.

    `server_name` is the name the server's certificate holds, where that is not the address's host.
    """

    ca: Path | str | None = None
    cert: Path | str | None = None
    key: Path | str | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("tls: cert and key belong together; give both or neither")


@dataclass(frozen=True)
class ChannelOptions:
    """How a client connects.

    Attributes:
        tls: None is plaintext. Its files are read again when they change: calls that start then use the new ones.
        token: a bearer token; without TLS only to this machine. token_file: a file that holds it instead, read again
            when it changes (a Kubernetes ServiceAccount's token is replaced every hour).
        timeout_s: deadline of a call that gives none of its own.
        max_message_bytes: largest request and answer.
        retries: most repeats of a call that is safe to repeat.
        wait_when_full: ask a full queue again after the time that it names; off, ResourceExhausted is raised at once,
            for a caller with callers of its own to tell.
    """

    tls: Tls | None = None
    token: str | None = field(default=None, repr=False)
    timeout_s: float = 60.0
    max_message_bytes: int = 256 * 1024 * 1024
    retries: int = 4
    token_file: Path | str | None = None
    wait_when_full: bool = True

    def __post_init__(self) -> None:
        if self.token is not None and self.token_file is not None:
            raise ValueError("token: give token or token_file, not both")


def parse_addresses(addresses: Addresses) -> list[str]:
    """ "host:port", "a:1,b:2" or a list of these; ValueError for anything else.

    gRPC's own "dns:", "ipv4:", "ipv6:" and "unix:" names go through as they are.
    """
    parts = addresses.split(",") if isinstance(addresses, str) else list(addresses)
    parsed = [part.strip() for part in parts if part.strip()]
    if not parsed:
        raise ValueError("give at least one address as host:port")
    for address in parsed:
        if not address.startswith(_SCHEMES):
            host, _, port = address.rpartition(":")
            if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
                raise ValueError(f"{address!r} is not host:port")
    return parsed


def check_token_may_travel(options: ChannelOptions, addresses: Sequence[str]) -> None:
    """ValueError where a token would travel in the clear to another machine."""
    has_token = options.token is not None or options.token_file is not None
    if has_token and options.tls is None and not all(_is_loopback(address) for address in addresses):
        raise ValueError("a token needs TLS beyond this machine: give ChannelOptions(tls=Tls(...))")


def open_sync(address: str, options: ChannelOptions) -> grpc.Channel:
    """A channel of the sync clients."""
    if options.tls is None:
        return grpc.insecure_channel(address, options=_arguments(options))
    return grpc.secure_channel(address, _credentials(options.tls), options=_arguments(options))


def open_async(address: str, options: ChannelOptions) -> grpc.aio.Channel:
    """A channel of the asyncio clients."""
    if options.tls is None:
        return grpc.aio.insecure_channel(address, options=_arguments(options))
    return grpc.aio.secure_channel(address, _credentials(options.tls), options=_arguments(options))


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    ca, key, cert = (None if path is None else Path(path).read_bytes() for path in (tls.ca, tls.key, tls.cert))
    return grpc.ssl_channel_credentials(ca, key, cert)


def _arguments(options: ChannelOptions) -> list[tuple[str, Any]]:
    arguments: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        # A name with several addresses behind it (a headless Service) is used evenly.
        ("grpc.lb_policy_name", "round_robin"),
        ("grpc.dns_min_time_between_resolutions_ms", round(1000 * LOOKUP_S)),
        ("grpc.keepalive_time_ms", 30_000),
        # gRPC's own pause between connection attempts grows to two minutes: a server that is back must be found soon.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # Retries are ours alone.
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
    ]
    if options.tls is not None and options.tls.server_name is not None:
        arguments.append(("grpc.ssl_target_name_override", options.tls.server_name))
    return arguments


def _is_loopback(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    name = address.partition(":")[2] if address.startswith(_SCHEMES) else address
    # dns:[//authority/]host:port, ipv4:a:1,b:2
    hosts = [part.rpartition(":")[0].strip("[]") for part in name.rpartition("/")[2].split(",")]
    return all(is_this_machine(host) for host in hosts)
