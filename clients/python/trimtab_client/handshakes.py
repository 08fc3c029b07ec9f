"""What gRPC's words for a connection that never came about mean, and what to change."""

from __future__ import annotations

_LAST_ERROR = "last error: "
_MEANINGS = (
    ("WRONG_VERSION_NUMBER", "the server speaks no TLS: connect without it"),
    ("certificate has expired", "the server's certificate has expired"),
    ("CERTIFICATE_VERIFY_FAILED", "the server's certificate is not signed by the authorities given: check tls ca"),
    ("certificate signature failure", "the server's certificate is not signed by the authorities given: check tls ca"),
    ("Hostname Verification", "the server's certificate is for another name: dial that, or give tls server_name"),
    ("Socket closed", "the server closed the connection: it may want TLS, or a client certificate that it trusts"),
)


def explain(message: str) -> str:
    """The message of an UNAVAILABLE call, led by its meaning where the connection failed for a known reason."""
    _, failed_to_connect, reason = message.partition(_LAST_ERROR)
    for words, meaning in _MEANINGS if failed_to_connect else ():
        if words in reason:
            return f"{meaning} (gRPC: {reason})"
    return message
