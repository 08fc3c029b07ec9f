"""Settings of the labeling server; YAML file, then TRIMTAB_*, then flags, as every server of trimtab."""

from pydantic import Field

from trimtab.runtime.config import ServiceConfig

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
    generator_token_file: str | None = Field(default=None, description="File with a bearer token for the generators.")
    max_upload_bytes: int = Field(default=256 * 1024 * 1024, ge=1024, description="Largest import by page or API.")
