"""What test_kill needs: the services as real processes, and a run that is seen to its end while some are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trimtab.rounds.launchers.local import Supervisor
from trimtab.rounds.launchers.process import ProcessState, RestartPolicy
from trimtab.rounds.launchers.services import service_process
from trimtab.weights.store import Store, open_store
from trimtab_client import ChannelOptions, RunStatus, StepMetrics, TrainerClient, TrimtabError, Unavailable
from trimtab_client.v1 import trainer_pb2

SERVICES = ("trainer", "generator", "reward", "reference")
MOMENTS = {
    "generating": "generating",
    "scoring": "generating",
    "training": "training",
    "publishing": "publishing",
    "saving": "saving",
}
"""Each moment with how the run's activity begins then. It is scoring once the journal has an episode of the step."""
EAGER = RestartPolicy(attempts=1000, first_s=0.05, longest_s=0.05)
LONGEST_RUN_S = 240.0


@dataclass(frozen=True)
class Kill:
    """SIGKILL of services at once, `delay_s` after the run at `step` was first seen doing `moment`."""

    services: tuple[str, ...]
    moment: str
    step: int
    delay_s: float


def random_kills(seed: int, steps: int, count: int) -> list[Kill]:
    """The first kill is of the trainer and another service, in turn over the seeds; more of any one or two."""
    choose = random.Random(seed)
    victims = [("trainer", SERVICES[1 + seed % 3])]
    victims += [tuple(choose.sample(SERVICES, choose.choice([1, 2]))) for _ in range(count - 1)]
    return [
        Kill(services, choose.choice(list(MOMENTS)), step, choose.uniform(0, 0.15))
        for services, step in zip(victims, sorted(choose.sample(range(steps - 2), count)), strict=True)
    ]


class Site:
    """The four services as processes of one supervisor, and a store."""

    def __init__(self, folder: Path, model: Path, reward_model: Path, supervisor: Supervisor) -> None:
        self.folder = folder
        self.supervisor = supervisor
        store = str(folder / "store")
        exact: dict[str, dict[str, object]] = {
            "trainer": {"folder": str(folder / "runs")},
            "generator": {"model": str(model), "max_slots": 1},  # one sequence a forward
            "reward": {"model": str(reward_model), "deterministic": True},
            "reference": {"model": str(model), "batch_tokens": 1},  # likewise
        }
        self.addresses: dict[str, str] = {}
        for name, settings in exact.items():
            spec = service_process(name, {"store": store, "metrics_port": None} | settings, folder / "services")
            self.addresses[name] = spec.address
            supervisor.add(spec)
        supervisor.wait_ready(timeout_s=120)

    @property
    def store(self) -> Store:
        return open_store(str(self.folder / "store"))

    def pid(self, service: str) -> int | None:
        """The process id of a service that runs now."""
        (status,) = [status for status in self.supervisor.statuses() if status.name == service]
        return status.pid if status.state is ProcessState.SERVING else None

    def kill(self, services: tuple[str, ...]) -> None:
        """SIGKILL; one that is down already stays so."""
        for pid in map(self.pid, services):
            if pid is not None:
                os.kill(pid, signal.SIGKILL)

    def strike(self, kill: Kill, run_id: str) -> None:
        """Kill at the moment, which is now or, when scoring, as soon as an episode is in the journal."""
        if kill.moment == "scoring":
            journal = self.folder / "runs" / run_id / "state" / "journal"
            written, give_up = _size_bytes(journal), time.monotonic() + 10
            while _size_bytes(journal) == written and time.monotonic() < give_up:
                time.sleep(0.001)
        time.sleep(kill.delay_s)
        self.kill(kill.services)

    def digest(self, run_id: str, name: str = "policy") -> str:
        """Of the newest version."""
        version = self.store.current_version(run_id, name)
        assert version is not None
        return version.digest

    def rows(self, run_id: str, file: str = "metrics.jsonl") -> list[dict]:
        return [json.loads(line) for line in (self.folder / "runs" / run_id / file).read_text().splitlines()]


@contextmanager
def site(folder: Path, model: Path, reward_model: Path) -> Iterator[Site]:
    """A site whose processes are gone at the end, each of them."""
    with Supervisor(policy=EAGER) as supervisor:
        yield Site(folder, model, reward_model, supervisor)


def run_to_its_end(
    place: Site,
    run_id: str,
    config: object,
    kills: list[Kill] | None = None,
    heard: Callable[[str], None] = lambda activity: None,
) -> tuple[RunStatus, list[StepMetrics]]:
    """Start a run, kill what is due, start it again after the trainer was killed; its last status, all steps seen."""
    due = list(kills or [])
    steps: list[StepMetrics] = []
    deadline = time.monotonic() + LONGEST_RUN_S
    with TrainerClient(place.addresses["trainer"], ChannelOptions(retries=0)) as client:
        while time.monotonic() < deadline:
            try:
                client.start(run_id, config)  # type: ignore[arg-type]
                for event in client.watch(run_id, after_step=steps[-1].step if steps else 0):
                    if isinstance(event, StepMetrics):
                        steps.append(event)
                        continue
                    heard(event.activity)
                    if event.finished:
                        assert not due, f"never killed: {due}"
                        return event, steps
                    reached = steps[-1].step if steps else 0
                    if due and _is_due(due[0], reached, event.activity):
                        threading.Thread(target=place.strike, args=(due.pop(0), run_id)).start()
            except (Unavailable, TrimtabError) as error:
                if not isinstance(error, Unavailable):
                    raise
                time.sleep(0.1)
    raise AssertionError(f"run {run_id} did not end in time")


def _size_bytes(journal: Path) -> int:
    """0 before the run's first step and after its last."""
    try:
        return journal.stat().st_size
    except FileNotFoundError:
        return 0


def _is_due(kill: Kill, reached: int, activity: str) -> bool:
    """At its moment of its step, or in the step after where the moment passed unseen."""
    return reached > kill.step or (reached == kill.step and activity.startswith(MOMENTS[kill.moment]))


def ppo_config(place: Site, prompts: Path, **changes: object) -> trainer_pb2.PpoConfig:
    """Six small steps, a checkpoint every two."""
    config = trainer_pb2.PpoConfig(
        prompts=str(prompts),
        generator_address=place.addresses["generator"],
        reward_address=place.addresses["reward"],
        reference_address=place.addresses["reference"],
        steps=6,
        batch_size=8,
        minibatch_size=4,
        inner_epochs=2,
        max_new_tokens=6,
        ema_decay=0.9,
        adaptive_kl_target=1.0,
        adaptive_kl_horizon=100.0,
        service_timeout_s=600.0,
        value_optimizer=trainer_pb2.OptimizerConfig(learning_rate=1e-2),
    )
    config.stage.optimizer.learning_rate = 1e-2
    config.stage.checkpoint_every_steps = 2
    for name, value in changes.items():
        setattr(config, name, value)
    return config
