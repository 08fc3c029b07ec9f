"""How long the rollouts of a batch take with more replicas: the real pipeline against stand-ins of known speed.

A stand-in has no need of a core, so the figures hold on a machine with fewer cores than replicas; what keeps the cost
from falling in proportion is the trainer's own work and the sharing out.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

from benchmarks.overlap import WARM_UP_STEPS, drive, ppo_config
from benchmarks.stand_ins import Delays, standing_in
from trimtab.trainer.loop_thread import LoopThread

NAMES = ("generator", "reward", "reference")


def rollout_seconds(replicas: int, *, batch_size: int = 64, steps: int = 2) -> float:
    """Mean seconds until a batch is sampled, scored and referenced by as many replicas of each of the three services.

    One replica samples a batch in 8.0 s, scores and references it in 2.4 s each: what the trainer and all stand-ins in
    its process do beside that then weighs little.
    """
    with closing(LoopThread("stand-ins")) as servers, tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        serving = [
            standing_in(Delays(batch_size, generate_s=8.0, score_s=2.4, reference_s=2.4)) for _ in range(replicas)
        ]
        stand_ins = []
        for one in serving:
            stand_ins.append(servers.submit(one.__aenter__()).result())
            stack.callback(lambda one=one: servers.submit(one.__aexit__(None, None, None)).result())
        addresses = {name: ",".join(one.addresses[name] for one in stand_ins) for name in NAMES}
        config = ppo_config(addresses, batch_size, WARM_UP_STEPS + 1 + steps, staleness=0)
        wall_s, _ = drive(stand_ins[0], config, Path(folder), train_s=0.0)
    return wall_s / steps
