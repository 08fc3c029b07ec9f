"""What overlaps in PPO: the trainer's real pipeline against stand-ins with known delays, at staleness 0, 1 and more.

    python -m benchmarks.overlap --out overlap.json

Generation takes 1.0 s a batch, scoring and referencing 0.3 s each, training 1.0 s (a sleep). Printed for each
staleness: seconds a step, that over the longest stage, and the share of time in which each service, and the trainer,
had nothing to do. Sleeps need no core, so the figures hold on a loaded machine as long as it answers in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stand_ins import DIGEST, Delays, StandIns, standing_in
from trimtab.trainer.journal import Journal
from trimtab.trainer.loop_thread import LoopThread
from trimtab.trainer.ppo.pipeline import Pipeline
from trimtab.trainer.ppo.prompts import Sampler
from trimtab.trainer.ppo.rollouts import RolloutClients
from trimtab.trainer.run import Run
from trimtab.trainer.stages import PpoConfig, parse_stage
from trimtab_client import ChannelOptions, ModelVersion

WARM_UP_STEPS = 2
TOKENIZER: Any = None  # token ids go over the wire as they are


@dataclass(frozen=True)
class Overlap:
    """One staleness: mean seconds a step, and idle shares of the wall time by service."""

    staleness: int
    step_s: float
    over_longest: float
    idle: dict[str, float]


def ppo_config(addresses: dict[str, str], batch_size: int, steps: int, staleness: int) -> PpoConfig:
    """A run of the stand-ins."""
    values = {f"{name}_address": address for name, address in addresses.items()}
    return parse_stage(  # type: ignore[return-value]
        "ppo",
        values
        | {
            "stage": {"model": "stand-in"},
            "prompts": "stand-in",
            "batch_size": batch_size,
            "minibatch_size": batch_size,
            "steps": steps,
            "max_staleness": staleness,
        },
    )


def drive(stand_ins: StandIns, config: PpoConfig, folder: Path, train_s: float) -> tuple[float, dict[str, float]]:
    """Run the steps; wall seconds and busy seconds by service of those after the warm-up."""
    run = Run("overlap", "ppo")
    prompts = Sampler([np.arange(1 + i % 5, dtype=np.int32) for i in range(64)], 0)
    with closing(Journal(folder / "journal")) as journal, closing(LoopThread("rollouts")) as loop:
        clients = RolloutClients(config, TOKENIZER, run.hindered, ChannelOptions())
        try:
            run.wait(loop.submit(clients.check(DIGEST)))
            pipeline = Pipeline(config, clients, prompts, journal, run, loop, 0)
            pipeline.admit(ModelVersion("overlap", "policy", 0, "blake3:0"))
            started, before = 0.0, {}
            for step in range(1, config.steps + 1):
                pipeline.take(step)
                if step == WARM_UP_STEPS + 1:
                    started = time.perf_counter()
                    before = {name: device.busy_s for name, device in stand_ins.devices.items()}
                if step == config.steps:
                    break
                time.sleep(train_s)
                pipeline.admit(ModelVersion("overlap", "policy", step, f"blake3:{step}"))
            wall = time.perf_counter() - started
            busy = {name: device.busy_s - before[name] for name, device in stand_ins.devices.items()}
        finally:
            loop.submit(clients.close()).result()
    return wall, busy


def measure(delays: Delays, train_s: float, staleness: int, steps: int) -> Overlap:
    """Steps at one staleness, between the takes of a steady stretch."""
    with closing(LoopThread("stand-ins")) as servers, tempfile.TemporaryDirectory() as folder:
        serving = standing_in(delays)
        stand_ins = servers.submit(serving.__aenter__()).result()
        config = ppo_config(stand_ins.addresses, delays.batch_size, WARM_UP_STEPS + 1 + steps, staleness)
        with ThreadPoolExecutor(1) as trainer:
            wall, busy = trainer.submit(drive, stand_ins, config, Path(folder), train_s).result()
        servers.submit(serving.__aexit__(None, None, None)).result()
    longest = max(delays.generate_s, delays.score_s, delays.reference_s, train_s)
    busy["train"] = train_s * steps
    idle = {name: max(0.0, 1 - seconds / wall) for name, seconds in busy.items()}
    return Overlap(staleness, wall / steps, wall / steps / longest, idle)


def main() -> None:
    """Measure, print a table, write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="measured steps a staleness")
    parser.add_argument("--batch", type=int, default=32, help="episodes a step")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=float, default=1.0, help="seconds of training a step")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    delays = Delays(chosen.batch)
    print(
        f"generate {delays.generate_s} s, score {delays.score_s} s, reference {delays.reference_s} s, "
        f"train {chosen.train} s a batch of {chosen.batch}"
    )
    print("staleness  s/step  /longest   idle: generate  score  reference  train")
    rows = []
    for staleness in chosen.staleness:
        row = measure(delays, chosen.train, staleness, chosen.steps)
        rows.append({"staleness": staleness, "step_s": row.step_s, "over_longest": row.over_longest, "idle": row.idle})
        shares = "  ".join(f"{row.idle[name]:6.1%}" for name in ("generate", "score", "reference", "train"))
        print(f"{staleness:9d}  {row.step_s:6.3f}  {row.over_longest:8.3f}           {shares}", flush=True)
    if chosen.out is not None:
        chosen.out.write_text(json.dumps({"delays": vars(delays) | {"train_s": chosen.train}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
