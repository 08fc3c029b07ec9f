"""The settings every server shares and how they are read: YAML file, then environment (TRIMTAB_*), then flags.

Each service subclasses `ServiceConfig` with its own fields. An instance made directly (tests, embedding) reads
neither files nor environment; only `load_config` does. A wrong setting is refused with one line that names it and
the reason.
"""

import ipaddress
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from trimtab.runtime.auth_config import AuthConfig

ENV_PREFIX = "TRIMTAB_"
ENV_NESTED_DELIMITER = "__"


class ConfigError(Exception):
    """A setting is wrong; the message is one line that names the field and the reason."""


class RequestLimits(BaseModel):
    """What one request may hold. Sequences and tokens are also told to clients by GetModel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_sequences: int = Field(default=512, ge=1)
    max_tokens: int = Field(default=524_288, ge=1)
    max_message_bytes: int = Field(default=256 * 1024 * 1024, ge=1024)
    max_concurrent_calls: int = Field(default=1024, ge=1)


class ServiceConfig(BaseSettings):
    """Settings of one server process."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=0, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    metrics_port: int | None = Field(default=0, ge=0, le=65535, description="Prometheus port; empty: no metrics.")
    health_port: int | None = Field(
        default=None, ge=0, le=65535, description="A second port with only grpc.health.v1, without TLS, for probes."
    )
    liveness_s: float | None = Field(
        default=120.0,
        gt=0,
        description="The liveness probe fails after so long without progress while work waits; empty: never.",
    )
    tls_cert: Path | None = Field(default=None, description="PEM certificate chain of the server.")
    tls_key: Path | None = Field(default=None, description="PEM private key of the server.")
    tls_client_ca: Path | None = Field(
        default=None, description="PEM authorities of client certificates; asks for mTLS."
    )
    auth: AuthConfig = AuthConfig()
    insecure: bool = Field(default=False, description="Allow a bind beyond loopback without TLS.")

    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    threads: int | None = Field(default=None, ge=1, le=1024, description="Compute threads of the process.")
    store: str | None = Field(default=None, description="Where versions live: a folder or an fsspec URL.")

    limits: RequestLimits = RequestLimits()
    queue_limit: int = Field(default=4096, ge=1, description="Most sequences that may wait for the device.")
    grace_s: float = Field(default=30.0, ge=0, description="Seconds that calls may take to finish after SIGTERM.")

    connection_age_s: float | None = Field(
        default=None,
        gt=0,
        description="A connection ends gently at about this age, so that clients look up who serves now; empty: never.",
    )

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "json", "pretty"] = Field(default="auto", description="auto: pretty on a terminal.")
    otlp_endpoint: str | None = Field(
        default=None, description="OpenTelemetry collector for traces over gRPC, host:port or URL; empty: no traces."
    )
    ready_file: Path | None = Field(default=None, description="Written as JSON with the bound ports once serving.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @property
    def has_tls(self) -> bool:
        return self.tls_cert is not None

    @property
    def max_message_bytes(self) -> int:
        """Largest message of the gRPC port, either way."""
        return self.limits.max_message_bytes

    @model_validator(mode="after")
    def _check_exposure(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_cert"
            raise ValueError(f"{missing}: tls_cert and tls_key must be given together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca: needs tls_cert and tls_key")
        if self.tls_client_ca is not None and self.auth.is_open:
            raise ValueError(
                "auth.certificates: tls_client_ca asks callers for certificates; say which names have which roles"
            )
        if self.auth.certificates and self.tls_client_ca is None:
            raise ValueError("tls_client_ca: auth.certificates needs the authorities that sign clients' certificates")
        if self.auth.wants_tokens and not self.has_tls and not is_loopback(self.host):
            raise ValueError("auth: bearer tokens travel over TLS only; give tls_cert and tls_key")
        if not self.has_tls and not self.insecure and not is_loopback(self.host):
            raise ValueError(
                f"host: {self.host} is reachable from other machines; give tls_cert and tls_key, or insecure: true"
            )
        return self


Config = TypeVar("Config", bound=ServiceConfig)


def is_loopback(host: str) -> bool:
    """Whether a bind address is reached from this machine only (a name other than localhost is not)."""
    bare = host.strip("[]")
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return bare == "localhost" or host.startswith("unix:")


def load_config(
    cls: type[Config], yaml_path: Path | str | None = None, overrides: dict[str, Any] | None = None
) -> Config:
    """Read the settings of one service: YAML file, then environment, then `overrides` (flags; None is not given).

    Environment names are TRIMTAB_ and the field in capitals, `__` between nested fields (TRIMTAB_LIMITS__MAX_TOKENS).
    Raises ConfigError with one line.
    """
    flags = {name: value for name, value in (overrides or {}).items() if value is not None}
    layers = {
        f"in {yaml_path}": _read_yaml(Path(yaml_path)) if yaml_path is not None else {},
        "from the environment": _read_environment(cls),
        "from the flags": flags,
    }
    merged: dict[str, Any] = {}
    for layer in layers.values():
        merged = _merge(merged, layer)
    try:
        return cls(**merged)
    except ValidationError as error:
        raise ConfigError(_one_line(error, layers)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config: {path} must hold settings as `name: value`, not {type(content).__name__}")
    return {str(name): value for name, value in content.items()}


def _read_environment(cls: type[ServiceConfig]) -> dict[str, Any]:
    source = EnvSettingsSource(
        cls, env_prefix=ENV_PREFIX, env_nested_delimiter=ENV_NESTED_DELIMITER, env_ignore_empty=True
    )
    try:
        return source()
    except SettingsError as error:
        raise ConfigError(f"environment: {error}") from None


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _one_line(error: ValidationError, layers: dict[str, dict[str, Any]]) -> str:
    return "; ".join(_describe(dict(problem), layers) for problem in error.errors(include_url=False))


def _describe(problem: dict[str, Any], layers: dict[str, dict[str, Any]]) -> str:
    location, message = problem["loc"], problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = "there is no such setting"
    elif problem["type"] == "missing":
        return f"{'.'.join(map(str, location))}: is required"
    if not location:
        return message
    origin = next((f"({place})" for place, layer in reversed(layers.items()) if location[0] in layer), "")
    return f"{'.'.join(map(str, location))}: {message} {origin}".rstrip()
