"""Settings of the trainer service; the stages' own configs are in `stages`."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from trimtab.runtime.config import ServiceConfig
from trimtab.runtime.peers import PeerConfig

DEFAULT_STORE = "runs/store"


class TrainerConfig(ServiceConfig):
    """One trainer process."""

    port: int = Field(default=7104, ge=0, le=65535, description="gRPC port; 0 takes a free one.")
    store: str | None = Field(
        default=DEFAULT_STORE, description="Where versions are published: a folder or fsspec URL."
    )
    folder: Path = Field(default=Path("runs"), description="Metrics and reports of each run go to FOLDER/RUN_ID.")

    keep_versions: int = Field(
        default=5,
        ge=1,
        description="Newest versions of a run that are kept, beside the current and pinned ones; "
        "PPO keeps at least max_staleness + 2.",
    )

    lease_ttl_s: float = Field(
        default=30.0,
        gt=0,
        description="How long the run of a trainer that is gone is closed to others.",
    )
    services: PeerConfig = Field(default=PeerConfig(), description="Credentials for the services that runs call.")
    full_version_every: int = Field(
        default=16,
        ge=1,
        description="Half-precision models are published as what changed, with a full version this often; 1: always.",
    )

    @property
    def compute_threads(self) -> int:
        """Threads while the trainer alone works: `threads`, else every core this process may use."""
        return self.threads or len(os.sched_getaffinity(0))
