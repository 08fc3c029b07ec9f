"""How a server reaches the services that it calls itself: their TLS and the credentials it shows them."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab_client import ChannelOptions, Tls


class PeerConfig(BaseModel):
    """Credentials towards other services; files are read again when they change."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tls: bool = Field(default=False, description="TLS by the system's authorities.")
    tls_ca: Path | None = Field(default=None, description="TLS by the authorities in this PEM.")
    tls_cert: Path | None = Field(default=None, description="PEM certificate that names this service to them.")
    tls_key: Path | None = Field(default=None, description="PEM key of that certificate.")
    tls_server_name: str | None = Field(default=None, description="The name in their certificates, if not the host's.")
    token_file: Path | None = Field(default=None, description="File with a bearer token for them.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together")
        return self

    def options(self) -> ChannelOptions:
        """Options of clients that show these credentials."""
        secured = self.tls or any((self.tls_ca, self.tls_cert, self.tls_server_name))
        tls = Tls(self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name) if secured else None
        return ChannelOptions(tls=tls, token_file=self.token_file)
