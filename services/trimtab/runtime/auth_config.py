"""Settings of who may call: the `auth` section of every server's config, gRPC and HTTP alike."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trimtab.runtime.roles import Role

Roles = tuple[Role, ...]


class JwtIssuer(BaseModel):
    """One issuer of JSON Web Tokens: an OIDC provider, or a Kubernetes cluster for its ServiceAccounts.

    A token's roles are those of every pattern of `subjects` that its `sub` fits, and those named in its claim
    `roles_claim` (a list, or words with blanks between; other words are passed over).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    issuer: str = Field(min_length=1, description="The tokens' `iss`, letter for letter.")
    audience: str = Field(min_length=1, description="What their `aud` must hold.")
    jwks: str = Field(min_length=1, description="The issuer's key set (JWKS): a file, or an https:// address.")
    jwks_ca: Path | None = Field(default=None, description="PEM authorities of that address; empty: the system's.")
    jwks_token_file: Path | None = Field(default=None, description="Bearer token shown to that address.")
    subjects: dict[str, Roles] = Field(default={}, description="Roles by `sub`; * stands for any letters.")
    roles_claim: str | None = Field(default=None, description="Claim that names roles; dots lead into nested ones.")
    leeway_s: float = Field(default=30.0, ge=0, le=600, description="How far clocks may disagree.")
    cache_s: float = Field(default=300.0, gt=0, description="How long a key set is used before it is read again.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.jwks.startswith("http://"):
            raise ValueError("jwks: a key set over plain http could be anybody's; give an https:// address or a file")
        if not self.subjects and self.roles_claim is None:
            raise ValueError("subjects: give roles by subject, or a roles_claim; without either no token has a role")
        return self


class AuthConfig(BaseModel):
    """Who may call, and with which roles. With nothing set everybody may: for this machine alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys_file: Path | None = Field(default=None, description="Static keys, made by `trimtab keys add`.")
    jwt: tuple[JwtIssuer, ...] = Field(default=(), description="Issuers of tokens that are believed.")
    certificates: dict[str, Roles] = Field(
        default={}, description="Roles by name (SAN) of a client's certificate; * stands for any letters."
    )
    audit_file: Path | None = Field(default=None, description="Where admin acts are appended, beside the log.")

    @property
    def wants_tokens(self) -> bool:
        """Whether bearer tokens are among the credentials."""
        return self.keys_file is not None or bool(self.jwt)

    @property
    def is_open(self) -> bool:
        """Whether everybody may call."""
        return not self.wants_tokens and not self.certificates
