"""Certificates of gRPC and HTTP servers from PEM files, read again for each new connection: a renewal needs no restart.

A certificate and key that do not belong together (one of them is being replaced) leave the old pair in force.
"""

import ssl
import time
from pathlib import Path
from typing import Any

import grpc

from trimtab.runtime.config import ServiceConfig
from trimtab.runtime.errors import StartError
from trimtab.runtime.logs import get_logger
from trimtab.runtime.reloading import stamp_of

log = get_logger(__name__)

COMPLAINT_PAUSE_S = 60.0


def server_credentials(config: ServiceConfig) -> grpc.ServerCredentials | None:
    """Credentials of the config's certificate and key, or None without TLS. StartError where a file is unusable."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    files = TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
    initial = grpc.ssl_server_certificate_configuration(*files.read())

    def fetch() -> Any:  # None, which the stubs forget, keeps the old one
        renewed = files.renewed()
        return None if renewed is None else grpc.ssl_server_certificate_configuration(*renewed)

    asks = config.tls_client_ca is not None
    return grpc.dynamic_ssl_server_credentials(initial, fetch, require_client_authentication=asks)


def http_context(config: ServiceConfig) -> ssl.SSLContext | None:
    """What an HTTP server of the config listens with, or None without TLS. StartError where a file is unusable.

    Each new connection gets the certificate, key and client authorities that are in the files by then.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    files = TlsFiles(config.tls_cert, config.tls_key, config.tls_client_ca)
    files.read()
    listening = newest = files.context()

    def at_hello(connection: ssl.SSLObject, name: str | None, made_with: ssl.SSLContext) -> None:
        nonlocal newest
        if files.renewed() is not None:
            try:
                newest = files.context()
            except StartError as error:  # replaced again in between: the next connection reads them anew
                log.error("keeping the old certificate", reason=str(error))
        connection.context = newest

    listening.sni_callback = at_hello
    return listening


class TlsFiles:
    """A server's certificate, its key, and the authorities of clients: read whole, checked, and again on change."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._cert = cert
        self._key = key
        self._client_ca = client_ca
        self._stamps = self._look()
        self._complained_s = float("-inf")

    def read(self) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
        """[(key, chain)] and the authorities, as gRPC takes them; StartError that names the unusable file."""
        authorities = _read("tls_client_ca", self._client_ca) if self._client_ca is not None else None
        pair = _read("tls_key", self._key), _read("tls_cert", self._cert)
        self.context()
        return [pair], authorities

    def context(self) -> ssl.SSLContext:
        """A server's context with what is in the files now; StartError that names the unusable file."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self._cert, self._key)
        except (ssl.SSLError, OSError) as error:
            raise StartError(f"tls_cert: {self._cert} and {self._key} are no usable pair: {_reason(error)}") from None
        if self._client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(self._client_ca)
            except (ssl.SSLError, OSError) as error:
                raise StartError(f"tls_client_ca: cannot use {self._client_ca}: {_reason(error)}") from None
        return context

    def renewed(self) -> tuple[list[tuple[bytes, bytes]], bytes | None] | None:
        """What to use from now on, or None where nothing changed or what is there is unusable (then it is logged)."""
        stamps = self._look()
        if stamps == self._stamps:
            return None
        try:
            files = self.read()
        except StartError as error:
            if time.monotonic() - self._complained_s > COMPLAINT_PAUSE_S:
                self._complained_s = time.monotonic()
                log.error("keeping the old certificate", reason=str(error))
            return None
        self._stamps, self._complained_s = stamps, float("-inf")
        log.info("certificate reloaded", path=str(self._cert))
        return files

    def _look(self) -> tuple[object, ...]:
        return tuple(stamp_of(path) for path in (self._cert, self._key, self._client_ca) if path is not None)


def _reason(error: OSError) -> str:
    return getattr(error, "reason", None) or error.strerror or "unreadable"


def _read(field: str, path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StartError(f"{field}: cannot read {path}: {error.strerror}") from None
    if b"-----BEGIN" not in content:
        raise StartError(f"{field}: {path} is not a PEM file")
    return content
