"""A run that goes wrong says so under a name, one that goes well says nothing."""

import json
import math
from pathlib import Path

import pytest

from trimtab.trainer.metric_sinks import METRIC
from trimtab.trainer.metrics import MetricWriter
from trimtab.trainer.run import Run
from trimtab.trainer.warning_signs import SIGNS, WarningWatch

DOCS = (Path(__file__).parents[3] / "docs" / "warnings.md").read_text()
GOOD = {
    "loss_policy": 0.1,
    "entropy_mean": 2.0,
    "kl_nats_per_sequence": 3.0,
    "response_length_mean": 40.0,
    "normalized_score_mean": 0.2,
    "skipped_steps": 0.0,
}


def standing(rows: list[dict[str, float]]) -> set[str]:
    watch = WarningWatch(rows[:-1])
    metrics = watch.judge(rows[-1])
    assert {f"warning_{name}" for name in watch.standing} == {name for name, value in metrics.items() if value}
    return set(watch.standing)


def run_of(steps: int = 20, **last: float) -> list[dict[str, float]]:
    """A good run that moves in equal steps to these values."""
    moved = {name: value - GOOD.get(name, 1.0) for name, value in last.items()}
    shares = [step / (steps - 1) for step in range(steps)]
    return [GOOD | {name: GOOD.get(name, 1.0) + by * share for name, by in moved.items()} for share in shares]


def test_a_good_run_raises_no_warning() -> None:
    assert standing(run_of(normalized_score_mean=2.0, entropy_mean=1.2, kl_nats_per_sequence=9.0)) == set()
    assert standing([GOOD]) == set()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_named(value: float) -> None:
    assert standing([GOOD, GOOD | {"loss_policy": value}]) == {"not_finite"}
    assert standing([{"loss": value}]) == {"not_finite"}
    assert standing([GOOD, GOOD | {"skipped_steps": 1.0}]) == {"not_finite"}


def test_an_entropy_collapse_is_named() -> None:
    assert standing(run_of(entropy_mean=0.05)) == {"entropy_collapse"}


def test_a_kl_explosion_is_named_whether_it_creeps_or_jumps() -> None:
    assert standing(run_of(kl_nats_per_sequence=30.0)) == {"kl_explosion"}
    assert standing([*run_of(), GOOD | {"kl_nats_per_sequence": 18.0}]) == {"kl_explosion"}


def test_rising_reward_with_drifting_length_is_named_and_neither_alone() -> None:
    assert standing(run_of(normalized_score_mean=1.0, response_length_mean=90.0)) == {"length_drift"}
    assert standing(run_of(normalized_score_mean=1.0, response_length_mean=15.0)) == {"length_drift"}
    assert standing(run_of(response_length_mean=90.0)) == set()


def test_a_reward_that_leaves_the_gold_score_is_named() -> None:
    assert standing(run_of(normalized_score_mean=2.0, gold_score_mean=-2.0)) == {"gold_divergence"}
    assert standing(run_of(normalized_score_mean=2.0, gold_score_mean=2.0)) == set()


def test_warnings_are_metrics_of_the_run_and_shown_while_they_stand(tmp_path: Path) -> None:
    run = Run("warned", "ppo")
    run.doing("training")
    with MetricWriter(run, tmp_path) as writer:
        writer.write(1, 3, GOOD | {"kl_nats_per_sequence": 100.0})
        assert "KL to the reference" in run.snapshot.activity and "kl_coefficient" in run.snapshot.activity
        assert METRIC.labels("warned", "ppo", "warning_kl_explosion")._value.get() == 1.0
        writer.write(2, 3, GOOD)
        assert run.snapshot.activity == "training"
        writer.write(3, 3, GOOD | {"kl_nats_per_sequence": 100.0})
    assert METRIC.labels("warned", "ppo", "warning_kl_explosion")._value.get() == 0.0, "a run that ended warns no more"
    assert METRIC.labels("warned", "ppo", "kl_nats_per_sequence")._value.get() == 100.0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["warning_kl_explosion"] for row in rows] == [1.0, 0.0, 1.0]


def test_every_sign_is_documented() -> None:
    for sign in SIGNS:
        assert f"| `{sign.name}` |" in DOCS
