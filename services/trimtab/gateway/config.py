"""Settings of the gateway: which services it fronts, and what a caller may ask of it."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from trimtab.runtime.config import ServiceConfig
from trimtab_client.clear_text import check_token_may_travel_to

DEFAULT_PORT = 7105
DEFAULT_HTTP_PORT = 7120


class GatewayConfig(ServiceConfig):
    """One gateway process: HTTP on `http_port`, and on `port` gRPC with the Open Inference Protocol and health.

    It holds no model and no state; `store` is what the dashboard shows the versions of. `auth` and `tls_…` are about
    its callers; what it shows to the services behind it is `upstream_…`.
    """

    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    http_port: int = Field(default=DEFAULT_HTTP_PORT, ge=0, le=65535, description="HTTP port; 0 takes a free one.")
    metrics_port: int | None = Field(default=9105, ge=0, le=65535, description="Prometheus port; empty: no metrics.")

    reward: str | None = Field(default=None, description="HOST:PORT of the reward service; several by commas.")
    generator: str | None = Field(default=None, description="HOST:PORT of the generator; several by commas.")
    trainer: str | None = Field(default=None, description="HOST:PORT of the trainer that the dashboard shows.")
    labeling: str | None = Field(
        default=None,
        description="https://HOST:PORT of the labeling page, on this machine http://…; its win rates are shown.",
    )
    labeling_token_file: Path | None = Field(default=None, description="File with a lead's access token for it.")
    reward_names: tuple[str, ...] = Field(
        default=("reward",), min_length=1, description="Names by which callers may ask for the reward model."
    )
    generator_names: tuple[str, ...] = Field(
        default=("policy",), min_length=1, description="Names by which callers may ask for the policy."
    )
    upstream_ca: Path | None = Field(default=None, description="PEM authorities of the services; asks for TLS.")
    upstream_cert: Path | None = Field(default=None, description="PEM certificate that names the gateway to them.")
    upstream_key: Path | None = Field(default=None, description="PEM key of that certificate.")
    upstream_server_name: str | None = Field(default=None, description="Name in their certificates, if not the host.")
    upstream_token_file: Path | None = Field(default=None, description="File with a bearer token for the services.")

    timeout_s: float = Field(default=60.0, gt=0, description="Deadline of a request that names none.")
    max_timeout_s: float = Field(default=600.0, gt=0, description="Longest deadline a request may name.")
    max_body_bytes: int = Field(default=16 * 1024 * 1024, ge=1024, description="Largest request body.")
    max_rows: int = Field(default=4096, ge=1, description="Most sequences of a request, over HTTP and gRPC.")
    body_timeout_s: float = Field(
        default=30.0, gt=0, description="Seconds in which a request's head, and then its body, must arrive."
    )
    requests_per_s: float | None = Field(
        default=200.0, gt=0, description="Requests a second of one caller in the long run; empty: no limit."
    )
    burst: int = Field(default=400, ge=1, description="Requests that a caller may send at once after a rest.")
    strip_special: tuple[str, ...] = Field(
        default=(),
        description="Special tokens, as text, that OpenRLHF leaves at the ends of its queries; taken off, since the "
        "reward model's tokenizer adds its own.",
    )

    @property
    def max_message_bytes(self) -> int:
        """The gRPC port takes what the HTTP port takes."""
        return self.max_body_bytes

    @model_validator(mode="after")
    def _check_upstreams(self) -> Self:
        if self.reward is None and self.generator is None and self.trainer is None:
            raise ValueError("reward: give the address of a reward service, a `generator` or a `trainer`, or all")
        if set(self.reward_names) & set(self.generator_names):
            raise ValueError("generator_names: a name cannot stand for both the policy and the reward model")
        if self.labeling is not None and not self.labeling.startswith(("http://", "https://")):
            raise ValueError("labeling: give the page's whole address, http://HOST:PORT or https://HOST:PORT")
        if self.labeling is not None:
            try:
                check_token_may_travel_to(self.labeling)
            except ValueError as error:
                raise ValueError(f"labeling: {error}") from None
        if (self.labeling is None) != (self.labeling_token_file is None):
            raise ValueError("labeling_token_file: labeling and labeling_token_file must be given together")
        if (self.upstream_cert is None) != (self.upstream_key is None):
            raise ValueError("upstream_key: upstream_cert and upstream_key must be given together")
        if self.timeout_s > self.max_timeout_s:
            raise ValueError(f"timeout_s: {self.timeout_s:g} is more than max_timeout_s, {self.max_timeout_s:g}")
        return self
