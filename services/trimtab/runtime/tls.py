"""Server credentials from PEM files, read again for each new connection so that a renewed one needs no restart."""

from pathlib import Path
from typing import Any

import grpc

from trimtab.runtime.config import ServiceConfig
from trimtab.runtime.errors import StartError
from trimtab.runtime.logs import get_logger

log = get_logger(__name__)


def server_credentials(config: ServiceConfig) -> grpc.ServerCredentials | None:
    """Credentials of the config's certificate and key, or None without TLS. StartError where a file cannot be read."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    first = _read_all(cert, key, client_ca)
    initial = grpc.ssl_server_certificate_configuration(*first)
    last = first

    def fetch() -> Any:  # None, which the stubs forget, keeps the old one
        nonlocal last
        try:
            files = _read_all(cert, key, client_ca)
        except StartError as error:
            log.error("keeping the old certificate", reason=str(error))
            return None
        if files == last:
            return None
        last = files
        log.info("certificate reloaded", path=str(cert))
        return grpc.ssl_server_certificate_configuration(*files)

    return grpc.dynamic_ssl_server_credentials(initial, fetch, require_client_authentication=client_ca is not None)


def _read_all(cert: Path, key: Path, client_ca: Path | None) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
    authorities = _read("tls_client_ca", client_ca) if client_ca is not None else None
    return [(_read("tls_key", key), _read("tls_cert", cert))], authorities


def _read(field: str, path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StartError(f"{field}: cannot read {path}: {error.strerror}") from None
    if b"-----BEGIN" not in content:
        raise StartError(f"{field}: {path} is not a PEM file")
    return content
