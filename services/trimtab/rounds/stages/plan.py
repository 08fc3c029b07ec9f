"""The stages of all rounds in their order: SFT and its evaluation (round 0), then the loop."""

from __future__ import annotations

from functools import partial

from trimtab.rounds.journal import StageResult
from trimtab.rounds.pipeline import Stage
from trimtab.rounds.stages.context import RoundsContext
from trimtab.rounds.stages.evaluation import run_evaluate
from trimtab.rounds.stages.publishing import run_publish
from trimtab.rounds.stages.ranking import run_rank, run_sample
from trimtab.rounds.stages.training import run_ppo, run_reward, run_sft

FIRST = ("sft", "evaluate", "publish")
EACH = ("sample", "rank", "reward", "ppo", "evaluate", "publish")


def stage_names(rounds: int) -> list[str]:
    """ "ROUND/STAGE" of every stage, in order."""
    return [f"0/{stage}" for stage in FIRST] + [f"{r}/{stage}" for r in range(1, rounds + 1) for stage in EACH]


def stages(context: RoundsContext) -> list[Stage]:
    """Every stage of the recipe, ready to run."""
    return [Stage(name, partial(_run, context, name)) for name in stage_names(context.recipe.rounds)]


def _run(context: RoundsContext, name: str, attempt: int) -> StageResult:
    number_text, _, stage = name.partition("/")
    number = int(number_text)
    match stage:
        case "sft":
            return run_sft(context, attempt)
        case "sample":
            return run_sample(context, number)
        case "rank":
            return run_rank(context, number)
        case "reward":
            return run_reward(context, number, attempt)
        case "ppo":
            return run_ppo(context, number, attempt)
        case "evaluate":
            return run_evaluate(context, number)
        case "publish":
            return run_publish(context, number)
        case _:
            raise ValueError(f"no stage {stage!r}")
