"""A run's samples as they travel, each beside the SFT policy's answer to its prompt where that is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trimtab.trainer.ppo.samples import newest_by_prompt, read_rows
from trimtab_client.v1 import trainer_pb2

MOST = 64


def read_samples(folder: Path, step: int, *, watched: bool) -> list[trainer_pb2.Sample]:
    """Samples of `step` (0: the newest), or with `watched` the newest to each prompt that step 1 began with."""
    first = {row["prompt_id"]: row for row in reversed(read_rows(folder, 1))}
    rows = list(newest_by_prompt(folder, set(first)).values()) if watched else read_rows(folder, step)
    return [_sample(row, first.get(row["prompt_id"])) for row in rows[:MOST]]


def _sample(row: dict[str, Any], first: dict[str, Any] | None) -> trainer_pb2.Sample:
    sample = trainer_pb2.Sample(**{key: value for key, value in row.items() if key != "prompt_id"})
    if first is not None and first["step"] != row["step"]:
        sample.first.CopyFrom(_sample(first, None))
    return sample
