"""The training stages of a round: SFT once, then a reward model on all rankings so far, and PPO against it.

A killed attempt's run is never gone on with: each attempt trains under a run id of its own, so equal steps of two
attempts cannot meet in the store.
"""

from __future__ import annotations

from pathlib import Path

from trimtab.rounds.journal import StageResult
from trimtab.rounds.recipe import file_digest
from trimtab.rounds.stages.context import RoundsContext, read_version, write_version
from trimtab.rounds.stages.ranking import HELD_OUT, TRAIN, rankings_folder
from trimtab_client import ModelVersion
from trimtab_client.v1 import trainer_pb2


def run_sft(context: RoundsContext, attempt: int) -> StageResult:
    """Fine-tune the recipe's model on demonstrations."""
    config = trainer_pb2.SftConfig()
    config.CopyFrom(context.configs.sft)
    config.stage.model = context.recipe.model
    config.stage.seed = context.seed(0)
    run_id = run_name(context, 0, "sft", attempt)
    trained = context.services.train("sft", run_id, config)
    policy = trained.published[-1]
    return StageResult(
        inputs={"model": context.recipe.model, "data": config.data},
        outputs={"run": trained.run_id, "policy": write_version(policy)},
        metrics=_metrics(context, policy),
    )


def run_reward(context: RoundsContext, number: int, attempt: int) -> StageResult:
    """Train a reward model, from the SFT policy, on the rankings of this and all earlier rounds."""
    config = trainer_pb2.RewardModelConfig()
    config.CopyFrom(context.configs.reward)
    config.stage.model = f"version:{context.sft}"
    config.stage.seed = context.seed(number, 1)
    config.data = str(rankings_folder(context, TRAIN))
    config.validation_data = str(rankings_folder(context, HELD_OUT))
    config.normalization_data = context.recipe.sample.prompts
    config.normalization_max_tokens = context.recipe.ppo.stage.max_new_tokens
    config.generator_address = context.services.generator(context.sft)
    run_id = run_name(context, number, "reward", attempt)
    trained = context.services.train("reward", run_id, config)
    reward = trained.published[-1]
    return StageResult(
        inputs={"policy": write_version(context.sft)} | _digests(context, TRAIN) | _digests(context, HELD_OUT),
        outputs={"run": trained.run_id, "reward": write_version(reward)},
        metrics=_metrics(context, reward),
    )


def run_ppo(context: RoundsContext, number: int, attempt: int) -> StageResult:
    """Train a policy against the round's reward model; the reference is the SFT policy."""
    reward = read_version(context.journal.output(f"{number}/reward", "reward"))
    start = context.best_before(number) if context.recipe.ppo.start == "best" else context.sft
    config = trainer_pb2.PpoConfig()
    config.CopyFrom(context.configs.ppo)
    config.stage.model = f"version:{start}"
    config.stage.seed = context.seed(number, 2)
    config.value_model = f"version:{reward}"
    addresses = context.services.generator_and_reference(start, context.sft)
    config.generator_address, config.reference_address = addresses
    config.reward_address = context.services.reward(reward)
    run_id = run_name(context, number, "ppo", attempt)
    trained = context.services.train("ppo", run_id, config)
    policy = trained.published[-1]
    return StageResult(
        inputs={
            "start": write_version(start),
            "reference": write_version(context.sft),
            "reward": write_version(reward),
            "prompts": config.prompts,
        },
        outputs={"run": trained.run_id, "policy": write_version(policy)},
        metrics=_metrics(context, policy),
    )


def run_name(context: RoundsContext, number: int, stage: str, attempt: int) -> str:
    """The trainer's run id of one attempt."""
    name = f"{context.recipe.name}-r{number}-{stage}"
    return name if attempt == 1 else f"{name}-attempt{attempt}"


def _metrics(context: RoundsContext, version: ModelVersion) -> dict[str, float]:
    return dict(context.store.get(version.run_id, version.name, version.step).metrics)


def _digests(context: RoundsContext, part: str) -> dict[str, str]:
    files = sorted(Path(rankings_folder(context, part)).glob("*.jsonl"))
    return {str(file.relative_to(context.folder)): file_digest(file) for file in files}
