"""`trimtab demo`: the small story model through SFT, reward model and PPO, as local services on real data.

This module knows the order of things; how a run is shown is the caller's (`watch`), what the result
looks like on paper is `report`'s.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from trimtab.rounds.demo.comparison import Comparison, Services, compare
from trimtab.rounds.demo.figures import Accuracy
from trimtab.rounds.demo.reward_accuracy import reward_accuracies
from trimtab.rounds.judge import Judge, SentenceEncoder
from trimtab.rounds.launchers.local import Supervisor
from trimtab.rounds.launchers.services import service_process
from trimtab_client import GeneratorClient, ModelVersion, ReferenceClient, RewardClient, Sampling, TrainerClient
from trimtab_client.v1 import trainer_pb2

EVALUATION_SAMPLES = 4
NORMALIZATION_PROMPTS = "ppo/openings.jsonl"

Watch = Callable[[str, str, str, object], None]
"""(trainer address, stage, run id, config) → shows the run to its end, raises where it fails."""


@dataclass(frozen=True)
class DemoRecipes:
    """The stage configs, as examples/demo/*.yaml gives them; paths and addresses are filled in here."""

    sft: trainer_pb2.SftConfig
    reward: trainer_pb2.RewardModelConfig
    ppo: trainer_pb2.PpoConfig


@dataclass(frozen=True)
class DemoResult:
    """What the demo made.

    Attributes:
        folder: everything lies here: data, store, logs, metrics.
        seconds: wall time of each part.
    """

    folder: Path
    store: Path
    sft: ModelVersion
    reward: ModelVersion
    policy: ModelVersion
    accuracies: tuple[Accuracy, ...]
    comparison: Comparison
    judge_accuracy: float
    seed: int
    seconds: dict[str, float]


class Demo:
    """One run of the demo in `folder`, from the examples folder."""

    def __init__(
        self,
        folder: Path,
        examples: Path,
        recipes: DemoRecipes,
        *,
        seed: int,
        cores: int,
        watch: Watch,
        say: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._examples = examples
        self._recipes = recipes
        self._seed = seed
        self._cores = cores
        self._watch = watch
        self._say = say
        self._store = folder / "store"
        self._seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def run(self, supervisor: Supervisor) -> DemoResult:
        """All stages and the evaluation; services are started with `supervisor` when their model exists."""
        data = self._prepare_data()
        [trainer] = self._serve(supervisor, {"trainer": {"folder": str(self._folder / "runs")}}, threads=self._cores)

        sft = self._sft(trainer, data)
        policies = {kind: {"model": f"version:{sft}"} for kind in ("generator", "reference")}
        generator, reference = self._serve(supervisor, policies, threads=1)
        reward_version = self._reward(trainer, data, sft, generator)
        [reward] = self._serve(supervisor, {"reward": {"model": f"version:{reward_version}"}}, threads=1)
        policy = self._ppo(trainer, data, sft, reward_version, (generator, reward, reference))

        accuracies = self._accuracies(data, reward_version, reward)
        judge = self._judge()
        comparison = self._evaluate(data, sft, policy, judge, (generator, reward, reference))
        return DemoResult(
            folder=self._folder,
            store=self._store,
            sft=sft,
            reward=reward_version,
            policy=policy,
            accuracies=accuracies,
            comparison=comparison,
            judge_accuracy=judge.accuracy,
            seed=self._seed,
            seconds=self._seconds,
        )

    def _prepare_data(self) -> Path:
        self._say("preparing stories, openings, people's rankings and the judge's sentences")
        data = self._folder / "data"
        subprocess.run(
            [sys.executable, str(self._examples / "data" / "prepare.py"), str(data)], check=True, capture_output=True
        )
        self._lap("prepare data")
        return data

    def _serve(self, supervisor: Supervisor, wanted: Mapping[str, Mapping[str, object]], *, threads: int) -> list[str]:
        """Start services, all at the same time, by kind with their settings; their addresses, once all serve."""
        shared, folder = {"store": str(self._store)}, self._folder / "services"
        specs = [service_process(kind, shared | dict(own), folder, threads=threads) for kind, own in wanted.items()]
        supervisor.add(*specs)
        supervisor.wait_ready(*wanted)
        for spec in specs:
            self._say(f"{spec.name} serves on {spec.address}")
        self._lap(f"start {' and '.join(wanted)}")
        return [spec.address for spec in specs]

    def _sft(self, trainer: str, data: Path) -> ModelVersion:
        config = trainer_pb2.SftConfig()
        config.CopyFrom(self._recipes.sft)
        config.stage.model = str(self._examples / "models" / "stories260K-hf")
        config.stage.seed = self._seed
        config.data = str(data / "sft" / "train.jsonl")
        config.validation_data = str(data / "sft" / "validation.jsonl")
        return self._train(trainer, "sft", config)

    def _reward(self, trainer: str, data: Path, sft: ModelVersion, generator: str) -> ModelVersion:
        config = trainer_pb2.RewardModelConfig()
        config.CopyFrom(self._recipes.reward)
        config.stage.model = f"version:{sft}"
        config.stage.seed = self._seed
        config.data = str(data / "reward" / "train.jsonl")
        config.validation_data = str(data / "reward" / "heldout.jsonl")
        config.normalization_data = str(data / NORMALIZATION_PROMPTS)
        config.generator_address = generator
        return self._train(trainer, "reward", config)

    def _ppo(
        self, trainer: str, data: Path, sft: ModelVersion, reward: ModelVersion, addresses: tuple[str, str, str]
    ) -> ModelVersion:
        config = trainer_pb2.PpoConfig()
        config.CopyFrom(self._recipes.ppo)
        config.stage.model = f"version:{sft}"
        config.stage.seed = self._seed
        config.prompts = str(data / "ppo" / "openings.jsonl")
        config.value_model = f"version:{reward}"
        config.generator_address, config.reward_address, config.reference_address = addresses
        return self._train(trainer, "ppo", config)

    def _train(self, trainer: str, stage: str, config: object) -> ModelVersion:
        run_id = f"demo-{stage}"
        self._watch(trainer, stage, run_id, config)
        with TrainerClient(trainer) as client:
            version = client.status(run_id).published[-1]
        self._lap(stage)
        return version

    def _accuracies(self, data: Path, version: ModelVersion, address: str) -> tuple[Accuracy, ...]:
        self._say("asking the reward model about held-out rankings")
        with RewardClient(address) as reward:
            accuracies = reward_accuracies(
                reward,
                str(self._store),
                version,
                {
                    "movie sentences, by the mean of their raters": (data / "reward" / "heldout.jsonl", "movies"),
                    "tweets, by the mean of their raters": (data / "reward" / "heldout.jsonl", "tweets"),
                    "movie sentences, by single persons": (data / "reward" / "heldout_persons.jsonl", "movies"),
                },
            )
        self._lap("check the reward model")
        return accuracies

    def _judge(self) -> Judge:
        self._say("loading the judge, which the training never sees")
        judge = Judge.load(self._examples / "data" / "judge.json", SentenceEncoder.load())
        self._lap("load the judge")
        return judge

    def _evaluate(
        self, data: Path, sft: ModelVersion, policy: ModelVersion, judge: Judge, addresses: tuple[str, str, str]
    ) -> Comparison:
        rows = (data / "evaluation" / "openings.jsonl").read_bytes().splitlines()
        openings = [json.loads(row)["prompt"] for row in rows]
        self._say(f"comparing {policy} with {sft} on {len(openings)} held-out openings")
        ppo = self._recipes.ppo
        sampling = Sampling(
            n=EVALUATION_SAMPLES, max_tokens=ppo.max_new_tokens, min_tokens=ppo.min_new_tokens, seed=self._seed
        )
        generator, reward, reference = addresses
        with GeneratorClient(generator) as g, RewardClient(reward) as r, ReferenceClient(reference) as f:
            comparison = compare(Services(g, r, f), sft, policy, openings, judge.log_odds, sampling)
        self._lap("evaluate")
        return comparison

    def _lap(self, part: str) -> None:
        now = time.monotonic()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._since
        self._since = now
