"""The last stage of a round: its policy and reward model under the recipe's name, and the pointer on the best policy.

NAME/policy@R is the policy of round R (0 is SFT), NAME/reward@R its reward model. The pointer of NAME/policy stands at
the round with the best held-out win rate, not at the last: whoever follows NAME/policy never follows it downhill.
"""

from __future__ import annotations

from trimtab.rounds.journal import StageResult
from trimtab.rounds.stages.context import RoundsContext, read_version, write_version
from trimtab.rounds.stages.training import run_name
from trimtab_client import ModelVersion


def run_publish(context: RoundsContext, number: int) -> StageResult:
    """Publish what the round made and move the pointer; harmless when it is done twice."""
    name, store, journal = context.recipe.name, context.store, context.journal
    chosen = read_version(journal.output(f"{number}/evaluate", "best"))
    record = journal.done(f"{number}/evaluate")
    assert record is not None
    policy = _copy(context, chosen, "policy", number, record.metrics)
    outputs = {"policy": write_version(policy)}
    if number:
        reward = read_version(journal.output(f"{number}/reward", "reward"))
        trained = journal.done(f"{number}/reward")
        assert trained is not None
        outputs["reward"] = write_version(_copy(context, reward, "reward", number, trained.metrics))
        store.set_current(name, "reward", number)
        _prune_checkpoints(context, number)
    best_round = max(range(number + 1), key=lambda r: (held_out_win_rate(context, r), -r))
    best = store.set_current(name, "policy", best_round).version
    return StageResult(
        inputs={"policy": write_version(chosen)},
        outputs=outputs | {"best": write_version(best)},
        metrics={"best_round": best_round, "judge_win_rate": held_out_win_rate(context, best_round)},
    )


def _prune_checkpoints(context: RoundsContext, number: int) -> None:
    """Leave the last checkpoint of the round's PPO runs, those of killed attempts too."""
    for attempt in range(1, context.journal.attempts(f"{number}/ppo") + 1):
        run_id = run_name(context, number, "ppo", attempt)
        if context.store.versions(run_id, "policy"):
            context.store.prune(run_id, "policy", keep_last=1)


def held_out_win_rate(context: RoundsContext, number: int) -> float:
    """The judge's win rate of a round's policy against SFT on held-out prompts; of SFT itself one half."""
    if number == 0:
        return 0.5
    record = context.journal.done(f"{number}/evaluate")
    assert record is not None
    return record.metrics["judge_win_rate"]


def _copy(
    context: RoundsContext, version: ModelVersion, name: str, number: int, metrics: dict[str, float]
) -> ModelVersion:
    """The same weights once more under the recipe's name; the pointer stays.

    Where an attempt that was killed has done it already, the source may be pruned, and is not needed.
    """
    done = context.store.versions(context.recipe.name, name)
    for manifest in done:
        if manifest.version.step == number and manifest.version.digest == version.digest:
            return manifest.version
    source = context.store.get(version.run_id, version.name, version.step)
    return context.store.publish(
        context.store.fetch(source),
        run_id=context.recipe.name,
        name=name,
        step=number,
        lineage=source.lineage | {"from": str(version), "round": str(number)},
        metrics=metrics,
        set_current=False,
    ).version
