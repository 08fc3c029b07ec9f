"""How commands reach a service: its address, TLS and a bearer token. The flags are shared by all such commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.cli.errors import CommandError

if TYPE_CHECKING:
    from trimtab_client import ChannelOptions

TlsFlag = Annotated[bool, typer.Option("--tls", help="Connect with TLS, by the system's authorities.")]
TlsCa = Annotated[
    Path | None, typer.Option(envvar="TRIMTAB_CLIENT_TLS_CA", help="Connect with TLS, by the authorities in this PEM.")
]
TlsCert = Annotated[
    Path | None, typer.Option(envvar="TRIMTAB_CLIENT_TLS_CERT", help="PEM certificate that names this client.")
]
TlsKey = Annotated[Path | None, typer.Option(envvar="TRIMTAB_CLIENT_TLS_KEY", help="PEM key of that certificate.")]
TokenFile = Annotated[
    Path | None, typer.Option(envvar="TRIMTAB_CLIENT_TOKEN_FILE", help="File that holds a bearer token.")
]


def channel_options(
    address: str, tls: bool, ca: Path | None, cert: Path | None, key: Path | None, token_file: Path | None
) -> ChannelOptions:
    """What a client of `address` ("host:port", several by commas) needs; CommandError for what cannot be.

    FileNotFoundError for a file that is not there.
    """
    from trimtab_client import ChannelOptions, Tls
    from trimtab_client.channel import parse_addresses
    from trimtab_client.credentials import Bearer

    for path in (ca, cert, key):
        if path is not None:
            path.stat()
    try:
        secured = Tls(ca, cert, key) if tls or ca or cert or key else None
        options = ChannelOptions(tls=secured, token_file=token_file)
        Bearer(options, parse_addresses(address))
    except ValueError as error:
        raise CommandError(str(error)) from error
    return options
