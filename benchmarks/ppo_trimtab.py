"""Our side of the PPO comparison: generator, reward, reference and trainer four processes, as `trimtab up` runs them.

The run is an ordinary one: started at the trainer service, its stages' seconds read from the metrics every run reports.
The update's own length is the time between two reports, so that nothing between steps is lost.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np

from benchmarks.lengths_proxy import LengthsProxy
from benchmarks.machine import cpu_seconds, peak_memory_mb
from benchmarks.models import WorkFolder
from benchmarks.sides import Case, SideRun
from trimtab.rounds.launchers.local import Supervisor
from trimtab.rounds.launchers.services import service_process
from trimtab_client import StepMetrics, TrainerClient
from trimtab_client.v1 import trainer_pb2

RUN_ID = "ppo-benchmark"
SERVICES = ("generator", "reward", "reference", "trainer")


@dataclass(frozen=True)
class Threads:
    """Cores of each process. Reward and reference work at the same time, after the generator has given most."""

    generator: int
    reward: int
    reference: int
    trainer: int

    @classmethod
    def of(cls, cores: int) -> Threads:
        half = max(1, cores // 2)
        return cls(generator=cores, reward=half, reference=half, trainer=cores)


def run_trimtab(
    folder: WorkFolder,
    case: Case,
    updates: int,
    scratch: Path,
    environment: Mapping[str, str] | None = None,
    micro_batch_tokens: int | None = None,
    old_logprobs: str = "trainer",
) -> SideRun:
    """Run `updates` PPO updates and measure all but the first (the only one, if there is one).

    `environment` is laid over that of the trainer process; `micro_batch_tokens` takes the place of the trainer's
    default. RuntimeError with the trainer's reason if the run fails.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    with running_services(folder, case, scratch, environment or {}) as (supervisor, addresses), ExitStack() as stack:
        if case.ragged:
            proxy = stack.enter_context(LengthsProxy(addresses["generator"], lengths_by_prompt(folder)))
            addresses["generator"] = proxy.address
        client = stack.enter_context(TrainerClient(addresses["trainer"]))
        config = ppo_config(folder, case, updates, addresses)
        if micro_batch_tokens is not None:
            config.stage.micro_batch_tokens = micro_batch_tokens
        config.old_logprobs = old_logprobs
        client.start(RUN_ID, config)
        steps: list[StepMetrics] = []
        pids = [os.getpid(), *(status.pid for status in supervisor.statuses() if status.pid is not None)]
        started_s, started_cpu_s = time.perf_counter(), sum(map(cpu_seconds, pids))
        for event in client.watch(RUN_ID):
            if isinstance(event, StepMetrics):
                steps.append(event)
            elif event.finished and event.state != "succeeded":
                raise RuntimeError(f"our run {event.state} at step {event.step}: {event.error} (logs in {scratch})")
        cores_used = (sum(map(cpu_seconds, pids)) - started_cpu_s) / (time.perf_counter() - started_s)
        resident_mb = peak_memory_mb(pids[1:])
    check_lengths(folder, case, steps)
    measured = tuple(stages(step, before) for before, step in zip([None, *steps], steps, strict=False))
    return SideRun(
        side="trimtab",
        updates=measured[1:] or measured,
        optimizer_steps=mean(step.values["optimizer_steps"] for step in steps),
        cores_used=cores_used,
        peak_rss_mb=resident_mb,
    )


@contextmanager
def running_services(
    folder: WorkFolder, case: Case, scratch: Path, environment: Mapping[str, str]
) -> Iterator[tuple[Supervisor, dict[str, str]]]:
    """The four services as processes that serve, and their addresses."""
    threads, store = Threads.of(case.threads), str(scratch / "store")
    settings: dict[str, dict[str, object]] = {
        "generator": {"model": str(folder.policy), "dtype": case.dtype, "max_slots": folder.work.prompts},
        "reward": {"model": str(folder.reward), "dtype": case.dtype},
        "reference": {"model": str(folder.policy), "dtype": case.dtype},
        "trainer": {"folder": str(scratch / "runs")},
    }
    specs = [
        service_process(
            name,
            {"store": store, "log_format": "json"} | settings[name],
            scratch,
            threads=getattr(threads, name),
            env=environment if name == "trainer" else None,
        )
        for name in SERVICES
    ]
    with Supervisor() as supervisor:
        supervisor.add(*specs)
        supervisor.wait_ready(timeout_s=180)
        yield supervisor, {spec.name: spec.address for spec in specs}


def ppo_config(folder: WorkFolder, case: Case, updates: int, addresses: Mapping[str, str]) -> trainer_pb2.PpoConfig:
    """The same work as the peer's: 64 responses, 4 epochs of 4 minibatches, a separate value model."""
    work = folder.work
    rate = trainer_pb2.OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_steps=0)
    return trainer_pb2.PpoConfig(
        stage=trainer_pb2.StageConfig(model=str(folder.policy), compute_dtype=case.dtype, optimizer=rate),
        prompts=str(folder.prompts),
        value_model=str(folder.reward),
        value_optimizer=rate,
        generator_address=addresses["generator"],
        reward_address=addresses["reward"],
        reference_address=addresses["reference"],
        steps=updates,
        batch_size=work.prompts,
        minibatch_size=work.minibatch_size,
        inner_epochs=work.inner_epochs,
        max_new_tokens=work.response_tokens,
        ignore_eos=True,
    )


def lengths_by_prompt(folder: WorkFolder) -> dict[bytes, int]:
    """The ragged case's response length of each prompt, by the prompt's ids as they travel."""
    prompts = (json.loads(row)["prompt"].split() for row in folder.prompts.read_text().splitlines())
    ids = (np.array([int(word[1:]) for word in words], dtype="<i4").tobytes() for words in prompts)
    return dict(zip(ids, folder.response_lengths_B, strict=True))


def check_lengths(folder: WorkFolder, case: Case, steps: list[StepMetrics]) -> None:
    """RuntimeError unless the responses of every update had the lengths that were asked for."""
    wanted = folder.response_lengths_B if case.ragged else (folder.work.response_tokens,)
    wanted_mean = mean(wanted)
    for step in steps:
        if abs(step.values["response_length_mean"] - wanted_mean) > 1e-3:
            got = step.values["response_length_mean"]
            raise RuntimeError(f"our responses had {got} tokens on average at step {step.step}, wanted {wanted_mean}")


def stages(step: StepMetrics, before: StepMetrics | None) -> dict[str, float]:
    """Seconds by stage (see sides.py) of one update."""
    values = step.values
    named = {
        "rollout": values["seconds_generate"],
        "reference": values["wait_share_reference"] * values["seconds_step"],
        "reward": values["wait_share_score"] * values["seconds_step"],
        "values": values["seconds_values"],
        "train": values["seconds_train"],
        "publish": values["seconds_publish"],
    }
    after = sum(named[stage] for stage in ("values", "train", "publish"))
    experience = values["seconds_step"] - after
    update = (step.time - before.time).total_seconds() if before is not None else values["seconds_step"]
    return named | {"experience": experience, "other": update - experience - after, "update": update}
