"""What the files of a recipe ask for, put together: the stages to train, the services to start, where versions go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.runtime.config import ServiceConfig
from trimtab.trainer.config import TrainerConfig
from trimtab.trainer.stages import PpoConfig, RewardModelConfig, SftConfig
from trimtab_client import ChannelOptions

StageConfig = SftConfig | RewardModelConfig | PpoConfig


@dataclass(frozen=True)
class Planned:
    """One stage; `name` is how `trimtab train` calls it: sft, reward or ppo."""

    name: str
    config: StageConfig


@dataclass(frozen=True)
class Plan:
    """A recipe as a whole.

    Attributes:
        stages: what is trained.
        services: what is started for it, by name ("generator", …), with its settings.
        store: where versions are published; None where the files do not say.
        folder: where the trainer keeps its runs; None where its own settings say, or nothing does.
        called: the addresses that a PPO stage calls and nothing in the files starts, by service.
        own_data: names of stage settings that hold training data, which the rounds make themselves.
        ranks, local_ranks: processes of the trainer in all, and on this machine.
        like: the model whose shape unpublished versions have.
        options: TLS and token for the services.
    """

    stages: tuple[Planned, ...] = ()
    services: Mapping[str, ServiceConfig] = field(default_factory=dict)
    store: str | None = None
    folder: Path | None = None
    called: Mapping[str, str] = field(default_factory=dict)
    own_data: frozenset[str] = frozenset()
    ranks: int = 1
    local_ranks: int = 1
    like: str | None = None
    options: ChannelOptions = field(default_factory=ChannelOptions)

    @property
    def ppo(self) -> PpoConfig | None:
        """The PPO stage, if there is one."""
        return next((stage.config for stage in self.stages if isinstance(stage.config, PpoConfig)), None)

    @property
    def trainer(self) -> TrainerConfig:
        """The trainer's settings; as they are by themselves where the files start none."""
        trainer = self.services.get("trainer")
        return trainer if isinstance(trainer, TrainerConfig) else TrainerConfig()

    @property
    def runs(self) -> Path:
        """Where checkpoints lie."""
        return self.folder or self.trainer.folder

    @property
    def trainer_device(self) -> str | None:
        """Where the trainer computes; None where the files do not say."""
        trainer = self.services.get("trainer")
        return trainer.device if trainer is not None else None
