"""What every stage of a run of rounds gets: the recipe, the journal, the store, the folder and the services."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.rounds.journal import Journal
from trimtab.rounds.recipe import Recipe
from trimtab.rounds.scorers import Scorer, open_scorer
from trimtab.rounds.stages.services import Services
from trimtab.weights.store import Store
from trimtab_client import ModelVersion, Sampling
from trimtab_client.v1 import trainer_pb2


@dataclass(frozen=True)
class StageConfigs:
    """The training stages' configs as the recipe gives them; models, data and addresses are filled in here."""

    sft: trainer_pb2.SftConfig
    reward: trainer_pb2.RewardModelConfig
    ppo: trainer_pb2.PpoConfig


@dataclass(frozen=True)
class RoundsContext:
    """Everything around a stage. `stack` closes what stages opened when the run ends."""

    recipe: Recipe
    configs: StageConfigs
    folder: Path
    store: Store
    journal: Journal
    services: Services
    stack: ExitStack
    say: Callable[[str], None]
    wait: bool = True
    _scorers: dict[str, Scorer] = field(default_factory=dict)

    def round_folder(self, number: int) -> Path:
        """Where a round's files lie; round 0 is SFT."""
        return self.folder / "rounds" / f"{number:03}"

    def seed(self, *parts: int) -> int:
        """A seed for one purpose, below 2**31."""
        value = self.recipe.seed
        for part in parts:
            value = (value * 1_000_003 + part + 1) % (1 << 31)
        return value

    def scorer(self, spec: str) -> Scorer:
        """The scorer of a recipe's text, made once."""
        if spec not in self._scorers:
            self.say(f"making the scorer {spec}")
            self._scorers[spec] = open_scorer(spec, self.services.gold, self.stack)
        return self._scorers[spec]

    def sampling(self, samples: int, seed: int) -> Sampling:
        """Answers are always sampled as PPO samples them."""
        ppo = self.recipe.ppo.stage
        return Sampling(
            n=samples,
            max_tokens=ppo.max_new_tokens,
            min_tokens=ppo.min_new_tokens,
            temperature=ppo.temperature,
            ignore_eos=ppo.ignore_eos,
            seed=seed,
        )

    @property
    def sft(self) -> ModelVersion:
        """The SFT policy: start of round 1, reference of every round."""
        return read_version(self.journal.output("0/sft", "policy"))

    def best_before(self, number: int) -> ModelVersion:
        """The best policy of all rounds before this one, as it was published under the recipe's name."""
        return read_version(self.journal.output(f"{number - 1}/publish", "best"))


def write_version(version: ModelVersion) -> str:
    """A version as the journal keeps it: "RUN/NAME@STEP blake3:…"."""
    return f"{version} {version.digest}"


def read_version(text: str) -> ModelVersion:
    """What `write_version` wrote."""
    name, _, digest = text.partition(" ")
    model, _, step = name.rpartition("@")
    run_id, _, model_name = model.partition("/")
    return ModelVersion(run_id, model_name, int(step), digest)
