"""Checkpoints on which reward model and judge part ways are pointed out."""

from typing import Any

from trimtab.rounds.evaluate import Interval
from trimtab.rounds.stages.evaluation import JUDGE, REWARD, Point, over_optimised

ANYTHING: Any = None


def point(version: str, reward: float, judge: float) -> Point:
    wins = {name: Interval(value, value - 0.05, value + 0.05) for name, value in ((REWARD, reward), (JUDGE, judge))}
    return Point(version, kl=ANYTHING, text=ANYTHING, wins=wins, means={})


def test_a_checkpoint_that_only_the_reward_model_prefers_is_named() -> None:
    points = [point("a@10", 0.6, 0.60), point("a@20", 0.7, 0.68), point("a@30", 0.9, 0.50)]
    (remark,) = over_optimised(points)
    assert "gold divergence from a@20 to a@30" in remark and "0.68 to 0.50" in remark


def test_a_judge_that_falls_within_its_interval_or_with_the_reward_is_not() -> None:
    assert over_optimised([point("a@10", 0.6, 0.60), point("a@20", 0.9, 0.55)]) == []
    assert over_optimised([point("a@10", 0.9, 0.80), point("a@20", 0.6, 0.50)]) == []
