"""The services of a run of rounds as local processes, each started when a stage first needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from trimtab.rounds.launchers.local import Supervisor
from trimtab.rounds.launchers.process import LaunchError, is_serving
from trimtab.rounds.launchers.services import SERVICES, service_process
from trimtab.rounds.pipeline import StageInterrupted
from trimtab.rounds.stages.training_runs import TrainedRun
from trimtab_client import GeneratorClient, ModelVersion, RewardClient, TrainerClient, Unavailable

RESTART_S = 120.0

Watch = Callable[[str, str, str, object], None]
"""(trainer address, stage, run id, config) → shows the run to its end, raises where it fails."""


class Services(Protocol):
    """What stages ask for, on this machine or on a cluster. Addresses are as clients take them."""

    def generator(self, version: ModelVersion) -> str:
        """Generators that serve a policy."""
        ...

    def generator_and_reference(self, version: ModelVersion, reference: ModelVersion | None) -> tuple[str, str]:
        """Generators that serve one policy, and references that serve another."""
        ...

    def reward(self, version: ModelVersion) -> str:
        """Reward services that serve a reward model."""
        ...

    def gold(self, source: str) -> str:
        """A reward service of its own for a model that judges or labels."""
        ...

    def train(self, stage: str, run_id: str, config: object) -> TrainedRun:
        """Run a stage ("sft", "reward", "ppo") to its end."""
        ...


class RoundServices:
    """Starts trainer, generator, reward and reference under a supervisor, and tells their addresses.

    The reference serves the SFT policy and nothing else; generator and reward load what a stage asks for.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        folder: Path,
        store: str,
        runs: Path,
        *,
        cores: int,
        keep_versions: int,
        watch: Watch,
    ) -> None:
        self._supervisor = supervisor
        self._folder = folder
        self._store = store
        self._runs = runs
        self._cores = cores
        self._keep_versions = keep_versions
        self._watch = watch
        self._addresses: dict[str, str] = {}

    def train(self, stage: str, run_id: str, config: object) -> TrainedRun:
        """Run a stage at the trainer, to its end; StageInterrupted if the trainer was gone meanwhile and is back."""
        trainer = self.trainer()
        try:
            self._watch(trainer, stage, run_id, config)
            with TrainerClient(trainer) as client:
                return TrainedRun(run_id, client.status(run_id).published)
        except Unavailable as error:
            self.trainer_is_back()
            raise StageInterrupted(f"the trainer was gone ({error})") from error

    def trainer(self) -> str:
        """The trainer's address, with every core while it alone works."""
        settings = {"folder": str(self._runs), "keep_versions": self._keep_versions}
        self._start({"trainer": ("trainer", settings)}, threads=self._cores)
        return self._addresses["trainer"]

    def trainer_is_back(self) -> None:
        """Return once a trainer that died serves again; LaunchError if it does not.

        The trainer itself is asked: the supervisor may not have noticed yet that it died.
        """
        deadline = time.monotonic() + RESTART_S
        while not is_serving(self._addresses["trainer"], SERVICES["trainer"].health_service):
            self._supervisor.raise_failure("trainer")
            if time.monotonic() >= deadline:
                raise LaunchError(f"the trainer did not come back within {RESTART_S:g} s")
            time.sleep(0.2)

    def generator(self, version: ModelVersion) -> str:
        """A generator that serves a policy."""
        return self.generator_and_reference(version, None)[0]

    def generator_and_reference(self, version: ModelVersion, reference: ModelVersion | None) -> tuple[str, str]:
        """A generator that serves one policy, and the reference that serves another (SFT, always)."""
        wanted = {"generator": ("generator", {"model": f"version:{version}"})}
        if reference is not None:
            wanted["reference"] = ("reference", {"model": f"version:{reference}"})
        self._start(wanted)
        with GeneratorClient(self._addresses["generator"]) as client:
            client.load_version(version)
        return self._addresses["generator"], self._addresses.get("reference", "")

    def reward(self, version: ModelVersion) -> str:
        """A reward service that serves a reward model."""
        self._start({"reward": ("reward", {"model": f"version:{version}"})})
        with RewardClient(self._addresses["reward"]) as client:
            client.load_version(version)
        return self._addresses["reward"]

    def gold(self, source: str) -> str:
        """A reward service of its own for a model that judges or labels."""
        name = f"gold-{sum(known.startswith('gold-') for known in self._addresses) + 1}"
        self._start({name: ("reward", {"model": source})})
        return self._addresses[name]

    def _start(self, wanted: Mapping[str, tuple[str, Mapping[str, object]]], *, threads: int = 1) -> None:
        """Start what does not run yet, all at the same time, and wait until it serves."""
        started = []
        for name, (kind, settings) in wanted.items():
            if name not in self._addresses:
                values = {"store": self._store} | dict(settings)
                spec = service_process(kind, values, self._folder, threads=threads, name=name)
                self._supervisor.add(spec)
                self._addresses[name] = spec.address
                started.append(name)
        if started:
            self._supervisor.wait_ready(*started)
