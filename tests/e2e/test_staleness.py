"""On the real small model, overlap costs no quality: staleness 1 is judged as staleness 0 is, within the interval."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from trimtab.cli.settings import read_yaml
from trimtab.cli.stage_config import stage_config
from trimtab.cli.watch_run import RunWatcher
from trimtab.rounds.demo.run import Demo, DemoRecipes
from trimtab.rounds.launchers.local import Supervisor
from trimtab_client import ModelVersion, TrainerClient
from trimtab_client.v1 import trainer_pb2

EXAMPLES = Path(__file__).parents[2] / "examples"


class BothWays(Demo):
    """The demo, with a second PPO run beside the first: the same but for its staleness."""

    def _train(self, trainer: str, stage: str, config: object) -> ModelVersion:
        version = super()._train(trainer, stage, config)
        if stage == "ppo":
            stale = trainer_pb2.PpoConfig()
            stale.CopyFrom(config)  # type: ignore[arg-type]
            stale.max_staleness = 1
            self._watch(trainer, stage, "demo-ppo-stale", stale)
            with TrainerClient(trainer) as client:
                self.stale = client.status("demo-ppo-stale").published[-1]
        return version

    def _evaluate(self, data, sft, policy, judge, addresses):
        self.stale_comparison = super()._evaluate(data, sft, self.stale, judge, addresses)
        return super()._evaluate(data, sft, policy, judge, addresses)


@pytest.mark.slow
@pytest.mark.timeout(3000)  # half an hour was too short beside other tests on two slow cores
def test_staleness_one_reaches_the_judge_score_of_zero(tmp_path):
    recipes: Mapping = {
        name: stage_config(name, {"model": "-"} | read_yaml(EXAMPLES / "demo" / f"{name}.yaml"), name)
        for name in ("sft", "reward", "ppo")
    }

    def watch(address: str, stage: str, run_id: str, config: object) -> None:
        RunWatcher(address, stage, run_id, config, None).run()  # type: ignore[arg-type]

    with Supervisor() as supervisor:
        demo = BothWays(
            tmp_path / "demo",
            EXAMPLES,
            DemoRecipes(**recipes),
            seed=0,
            cores=len(os.sched_getaffinity(0)),
            watch=watch,
            say=print,
        )
        on_policy = demo.run(supervisor).comparison.win_rate
    stale = demo.stale_comparison.win_rate
    print(f"win rate against SFT: staleness 0 {on_policy.percent()}, staleness 1 {stale.percent()}")
    assert stale.excludes(0.5) and stale.low > 0.5
    assert stale.high >= on_policy.low and on_policy.high >= stale.low
