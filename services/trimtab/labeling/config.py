"""Settings of the labeling server; YAML file, then TRIMTAB_*, then flags, as every server of trimtab."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from trimtab.runtime.config import ServiceConfig
from trimtab_client import ChannelOptions, Tls

DEFAULT_PORT = 7110
DEFAULT_DATABASE = "runs/labels.sqlite"


class LabelingConfig(ServiceConfig):
    """Settings of one labeling server."""

    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535, description="HTTP port; 0 takes a free one.")
    database: str = Field(
        default=DEFAULT_DATABASE, description="Path of a SQLite file, or a URL as postgresql://user@host/name."
    )
    session_hours: float = Field(default=12.0, gt=0, le=24 * 30, description="A sign-in lasts so long without use.")
    feed: bool = Field(default=True, description="Ask the campaigns' generators for responses.")
    generator_token_file: Path | None = Field(default=None, description="File with a bearer token for the generators.")
    generator_ca: Path | None = Field(default=None, description="PEM authorities of the generators' certificates.")
    generator_cert: Path | None = Field(default=None, description="PEM certificate that names this server to them.")
    generator_key: Path | None = Field(default=None, description="PEM key of that certificate.")
    generator_server_name: str | None = Field(default=None, description="Name in their certificate, if not the host.")
    max_upload_bytes: int = Field(default=256 * 1024 * 1024, ge=1024, description="Largest import by page or API.")

    def generator_options(self) -> ChannelOptions:
        """How the generators are called: with TLS where an authority or a certificate is given. ValueError, OSError."""
        files = (self.generator_ca, self.generator_cert, self.generator_key)
        tls = Tls(*files, self.generator_server_name) if any(files) else None
        if self.generator_token_file is not None:
            self.generator_token_file.read_text()  # it is there now; each call reads it as it is then
        return ChannelOptions(tls=tls, token_file=self.generator_token_file)

    @model_validator(mode="after")
    def _check_entrance(self) -> Self:
        if not self.auth.is_open:
            raise ValueError("auth: labeling knows people by its own sign-in and tokens; `trimtab label labeler add`")
        return self
