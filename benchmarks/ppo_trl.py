"""TRL's side of the PPO comparison: runs peers/trl_ppo.py in its own environment and reads what it wrote."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from benchmarks.models import WorkFolder
from benchmarks.sides import PARTS_OF_EXPERIENCE, Case, SideRun

DRIVER = Path(__file__).parent / "peers" / "trl_ppo.py"
REQUIREMENTS = DRIVER.with_name("trl_ppo.requirements.txt")


def run_trl(python: Path, folder: WorkFolder, case: Case, updates: int, scratch: Path) -> SideRun:
    """Run `updates` PPO updates and measure all but the first (the only one, if there is one).

    Raises RuntimeError with the end of its log if it fails.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    out, log = scratch / "trl.json", scratch / "trl.log"
    work = folder.work
    options = {
        "--model-dir": folder.policy,
        "--reward-dir": folder.reward,
        "--prompts": folder.prompts,
        "--dtype": case.dtype,
        "--threads": case.threads,
        "--updates": updates,
        "--response-tokens": work.response_tokens,
        "--batch-size": work.prompts,
        "--minibatch-size": work.minibatch_size,
        "--inner-epochs": work.inner_epochs,
        "--out": out,
    }
    command = [str(python), str(DRIVER), *(str(part) for option in options.items() for part in option)]
    with log.open("w") as lines:
        ended = subprocess.run(
            command + ["--ragged"] * case.ragged,
            stdout=lines,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            check=False,
        )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} failed; the end of {log}:\n{log.read_text()[-2000:]}")
    result = json.loads(out.read_text())
    measured = tuple(stages(update) for update in result["updates"])
    return SideRun(
        side=result["peer"],
        updates=measured[1:] or measured,
        optimizer_steps=result["optimizer_steps_per_update"],
        cores_used=result["cores_used"],
        peak_rss_mb=result["peak_rss_mb"],
    )


def stages(update: dict[str, float]) -> dict[str, float]:
    """Seconds by stage (see sides.py) of one update."""
    renamed = {("values" if stage == "value" else stage): seconds for stage, seconds in update.items()}
    experience = sum(renamed[stage] for stage in PARTS_OF_EXPERIENCE)
    return renamed | {"experience": experience, "publish": 0.0}
