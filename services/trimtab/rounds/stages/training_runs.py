"""What a stage of training gives back, wherever it ran."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab_client import ModelVersion


@dataclass(frozen=True)
class TrainedRun:
    """A training run that has succeeded. `run_id` is that of an earlier attempt where its run was gone on with."""

    run_id: str
    published: tuple[ModelVersion, ...]
